"""Loading pretrained backbones: every number in the files is in the model afterwards."""

from compat.suites.probes import named

CHECK = "Backbone Loading"


def test_backbones_load(ask):
    reply = ask("backbones")
    assert reply["loaded"] is True, (
        f"load_backbone=True built a model but loaded nothing ({reply['loaded']!r})"
    )
    assert reply["total"] > 0, "the pretrained files held no tensor, so nothing could be loaded"


def test_the_model_holds_every_tensor_of_the_files(ask):
    reply = ask("backbones")
    missing = reply["missing"]
    assert not missing, (
        f"{len(missing)} of {reply['total']} tensors in the pretrained files are not in the model: "
        f"{named(missing, 4)}. "
        "Are they skipped, transposed, or overwritten by fresh initialisation?"
    )
