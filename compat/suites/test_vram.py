"""Memory at its peak, as the device's allocator counts it: it holds the weights, and grows with the work."""

CHECK = "VRAM"


def peak(ask, probes, rows: int, step: str) -> dict:
    batch = [probes.row(16, seed=seed, images=(seed,), labels="all") for seed in range(rows)]
    reply = ask("memory", rows=batch, step=step)
    for name in ("peak_bytes", "parameters_bytes"):
        assert isinstance(reply[name], int) and reply[name] > 0, (
            f"{name} of a {step} step is {reply[name]!r} ({reply['how']})"
        )
    return reply


def mb(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"


def test_peak_of_a_forward_pass_holds_the_weights(ask, probes):
    reply = peak(ask, probes, 1, "forward")
    assert reply["peak_bytes"] > reply["parameters_bytes"], (
        f"the peak of a forward pass, {mb(reply['peak_bytes'])}, is below the weights' "
        f"{mb(reply['parameters_bytes'])} "
        f"({reply['how']}): is part of the model on another device?"
    )


def test_a_training_step_needs_more_than_a_forward_pass(ask, probes):
    forward, train = peak(ask, probes, 1, "forward"), peak(ask, probes, 1, "train")
    assert train["peak_bytes"] >= forward["peak_bytes"], (
        f"a training step peaks at {mb(train['peak_bytes'])}, below a forward pass at "
        f"{mb(forward['peak_bytes'])} "
        f"({train['how']}): are gradients computed at all?"
    )


def test_memory_grows_with_the_batch(ask, probes):
    small, large = peak(ask, probes, 1, "train"), peak(ask, probes, 6, "train")
    assert large["peak_bytes"] > small["peak_bytes"], (
        f"6 rows peak at {mb(large['peak_bytes'])}, 1 row at {mb(small['peak_bytes'])} ({large['how']}): "
        "is only part of the batch computed?"
    )
