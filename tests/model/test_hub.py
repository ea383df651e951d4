"""Models come from the Hub and go there: the real `huggingface_hub` client, a Hub on loopback.

The first tests ask the bare client, so that a fault of the stand-in is not taken for one of nanovlm's.
Functions above the fixtures run in a `Client`: a process that started with the Hub's environment.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_client import Client, Raised
from tests.hub_server import TOKEN, USER, HubServer
from tests.hub_server import hub as hub

LAST = "model-00002-of-00002.safetensors"


def bare(function: str, *arguments, **options) -> str:
    """A function of huggingface_hub itself."""
    import huggingface_hub

    return str(getattr(huggingface_hub, function)(*arguments, **options))


def load(repo: str, revision: str | None = None) -> dict[str, str]:
    """What from_pretrained gives: a digest of each tensor, and the config under "config"."""
    from nanovlm import VisionLanguageModel

    return digests(VisionLanguageModel.from_pretrained(repo, revision=revision))


def load_as_stranger(repo: str) -> dict[str, str]:
    """As load, without the token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_TOKEN")  # read at every request
        return load(repo)


def command(repo: str) -> dict:
    """What `nanovlm generate --hf_model` prints."""
    import contextlib
    import io

    from nanovlm.cli import main

    shown = io.StringIO()
    line = ["generate", "--hf_model", repo, "--generations", "2", "--max_new_tokens", "4", "--json"]
    with contextlib.redirect_stdout(shown):
        code = main([*line, "--device", "cpu", "--prompt", "What?"])
    return {"code": code, **json.loads(shown.getvalue() or "{}")}


def push(folder: str, repo: str, private: bool) -> None:
    from nanovlm import VisionLanguageModel

    VisionLanguageModel.from_pretrained(folder).push_to_hub(repo, private=private)


def load_backbones(vision: str, language: str, folder: str) -> None:
    """A new model over the two repositories, saved to `folder`."""
    from nanovlm import VisionLanguageModel, preset

    cfg = preset("tiny", vit_model_type=vision, lm_model_type=language)
    VisionLanguageModel(cfg, load_backbone=True).save_pretrained(folder)


def encode(repo: str, text: str) -> list[int]:
    from nanovlm import get_tokenizer

    return list(get_tokenizer(repo).encode(text))


def digests(model) -> dict[str, str]:
    found = {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in model.state_dict().items()}
    return found | {"config": json.dumps(model.cfg.to_json_dict(), sort_keys=True)}


@pytest.fixture(scope="module")
def online(hub: HubServer) -> Iterator[Client]:
    with hub.client() as client:
        yield client


@pytest.fixture(scope="module")
def offline(hub: HubServer) -> Iterator[Client]:
    """Shares the cache of `online`."""
    with hub.client(offline=True) as client:
        yield client


# The stand-in, asked by the bare client.


def test_the_bare_client_downloads_files_and_snapshots_of_branches_and_commits(hub, online):
    first = hub.add("any/files", {"a.txt": b"1", "in/b.bin": bytes(range(256)) * 9000})
    hub.add("any/files", {"a.txt": b"2"})
    hub.add("any/files", {"a.txt": b"3"}, revision="other")
    for revision, content in ((None, b"2"), ("main", b"2"), ("other", b"3"), (first, b"1")):
        path = Path(online(bare, "hf_hub_download", "any/files", "a.txt", revision=revision))
        assert path.read_bytes() == content, revision
        folder = Path(online(bare, "snapshot_download", "any/files", revision=revision))
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        assert files == hub.files("any/files", revision or "main")


@pytest.mark.parametrize(
    ("repo", "file", "revision", "kind"),
    [
        ("any/absent", "a.txt", "main", "RepositoryNotFoundError"),
        ("any/present", "absent.txt", "main", "EntryNotFoundError"),
        ("any/present", "a.txt", "absent", "RevisionNotFoundError"),
        ("any/present", "a.txt", "0" * 40, "RevisionNotFoundError"),
    ],
)
def test_the_bare_client_names_what_is_absent_as_against_the_hub(hub, online, repo, file, revision, kind):
    hub.add("any/present", {"a.txt": b""})
    with pytest.raises(Raised) as raised:
        online(bare, "hf_hub_download", repo, file, revision=revision)
    assert kind in raised.value.kinds


def test_the_bare_client_works_offline_from_its_cache_alone(hub, online, offline):
    hub.add("any/cached", {"a.txt": b"cached", "b.txt": b""})
    online(bare, "hf_hub_download", "any/cached", "a.txt")
    hub.requests.clear()
    assert Path(offline(bare, "hf_hub_download", "any/cached", "a.txt")).read_bytes() == b"cached"
    with pytest.raises(Raised) as raised:
        offline(bare, "hf_hub_download", "any/cached", "b.txt")
    assert "LocalEntryNotFoundError" in raised.value.kinds
    assert hub.requests == []


def test_the_bare_client_uploads_small_files_in_the_commit_and_large_ones_by_lfs(hub, online, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nA card.\n")
    (tmp_path / "model.safetensors").write_bytes(b"weights" * 1000)
    (tmp_path / "vocabulary.txt").write_bytes(b"word\n" * 500_000)
    online(bare, "create_repo", f"{USER}/uploaded", private=True)
    for _ in range(2):  # the second finds nothing changed, and makes no commit
        online(bare, "upload_folder", repo_id=f"{USER}/uploaded", folder_path=str(tmp_path))
    files = hub.repos[f"{USER}/uploaded"].at("main").files
    assert {name for name, file in files.items() if file.lfs} == {"model.safetensors", "vocabulary.txt"}
    assert {name: file.data for name, file in files.items() if name != ".gitattributes"} == {
        path.name: path.read_bytes() for path in tmp_path.iterdir()
    }
    assert len(hub.repos[f"{USER}/uploaded"].branches["main"]) == 2


def test_the_bare_client_sees_a_private_repository_only_with_its_owners_token(hub, online):
    hub.add(f"{USER}/secret", {"a.txt": b"secret"}, private=True)
    for token, kind in ((False, "RepositoryNotFoundError"), ("hf_another", "HfHubHTTPError")):
        with pytest.raises(Raised) as raised:
            online(bare, "hf_hub_download", f"{USER}/secret", "a.txt", token=token)
        assert kind in raised.value.kinds
    given = Path(online(bare, "hf_hub_download", f"{USER}/secret", "a.txt", token=TOKEN))
    assert given.read_bytes() == b"secret"
    with pytest.raises(Raised, match="rights to write under the namespace"):
        online(bare, "create_repo", "somebody/model")


# nanovlm, through the same client.


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, tuple[dict[str, bytes], dict[str, str]]]:
    """Two tiny models of different weights: the files that save_pretrained writes, and what should load."""
    import torch

    from nanovlm import VisionLanguageModel, preset

    made = {}
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = VisionLanguageModel(preset("tiny"), load_backbone=False)
        folder = tmp_path_factory.mktemp("saved")
        model.save_pretrained(folder)
        made[f"model {seed}"] = {path.name: path.read_bytes() for path in folder.iterdir()}, digests(model)
    assert made["model 1"][1] != made["model 2"][1]
    return made


@pytest.fixture(scope="module")
def sharded(saved) -> dict[str, bytes]:
    """The files of "model 1" with its weights in two shards and an index."""
    from safetensors.torch import load, save

    files = dict(saved["model 1"][0])
    tensors = load(files.pop("model.safetensors"))
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], LAST: names[1::2]}
    files |= {shard: save({name: tensors[name] for name in held}) for shard, held in shards.items()}
    index = {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
        "weight_map": {name: shard for shard, held in shards.items() for name in held},
    }
    return files | {"model.safetensors.index.json": json.dumps(index).encode()}


def resolved(hub: HubServer) -> set[str]:
    """Files whose content was fetched since the log was cleared."""
    return {r.path.split("/")[-1] for r in hub.requests if r.method == "GET" and "/resolve/" in r.path}


def test_a_repository_loads_as_the_model_that_was_saved_and_only_its_model_is_fetched(hub, online, saved):
    files, expected = saved["model 1"]
    hub.add("any/whole", files | {"optimizer.pt": b"pickle", "notes/log.txt": b""})
    hub.requests.clear()
    assert online(load, "any/whole") == expected
    assert {"config.json", "model.safetensors"} <= resolved(hub) <= set(files)


def test_the_command_answers_by_a_repository_and_refuses_one_that_is_none(hub, online, saved):
    hub.add("any/asked", saved["model 1"][0])
    hub.requests.clear()
    said = online(command, "any/asked")
    assert said["code"] == 0 and said["prompt"] == "What?" and len(said["generations"]) == 2
    assert {"config.json", "model.safetensors"} <= resolved(hub)
    assert online(command, "any/none-such") == {"code": 2}


def test_revision_selects_a_branch_or_a_commit(hub, online, saved):
    (old, expected_old), (new, expected_new) = saved["model 1"], saved["model 2"]
    commit = hub.add("any/revisions", old)
    hub.add("any/revisions", old, revision="stable")
    hub.add("any/revisions", new)
    assert online(load, "any/revisions", "stable") == expected_old
    assert online(load, "any/revisions", commit) == expected_old
    assert online(load, "any/revisions") == expected_new


def test_sharded_weights_load_by_their_index(hub, online, saved, sharded):
    hub.add("any/sharded", sharded)
    assert online(load, "any/sharded") == saved["model 1"][1]


def test_a_shard_that_the_repository_lacks_is_named(hub, online, sharded):
    hub.add("any/lost", {name: data for name, data in sharded.items() if name != LAST})
    with pytest.raises(Raised, match=f"index.json names the shard {LAST}, but any/lost") as raised:
        online(load, "any/lost")
    assert "WeightsError" in raised.value.kinds


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_offline_a_loaded_repository_loads_again_without_a_request(hub, online, offline, saved, sharded, kind):
    files, expected = saved["model 1"]
    hub.add(f"any/again-{kind}", sharded if kind == "sharded" else files)
    online(load, f"any/again-{kind}")
    hub.requests.clear()
    assert offline(load, f"any/again-{kind}") == expected
    assert hub.requests == []


def test_a_second_load_fetches_nothing_anew(hub, online, saved):
    files, expected = saved["model 1"]
    hub.add("any/twice", files)
    online(load, "any/twice")
    hub.requests.clear()
    assert online(load, "any/twice") == expected
    assert resolved(hub) == set()


def test_offline_a_snapshot_loads_though_nobody_asked_for_the_files_it_lacks(hub, online, offline, saved, sharded):
    hub.add("any/snapshot", sharded)
    online(bare, "snapshot_download", "any/snapshot")
    assert offline(load, "any/snapshot") == saved["model 1"][1]


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_a_branch_that_moves_between_two_downloads_still_gives_one_commit(hub, online, saved, sharded, kind):
    files, expected = saved["model 1"]
    repo = f"any/moving-{kind}"
    hub.add(repo, sharded if kind == "sharded" else files)

    def move(request):
        if request.method == "GET" and request.path.endswith("config.json"):
            hub.after = still
            hub.add(repo, saved["model 2"][0])

    still, hub.after = hub.after, move
    assert online(load, repo) == expected
    assert hub.after is still and online(load, repo) == saved["model 2"][1]


@pytest.mark.slow  # waits for the client's own retries
def test_a_hub_that_does_not_answer_is_named_and_the_cache_still_serves(hub, online, saved):
    files, expected = saved["model 1"]
    for name in ("any/silent", "any/silent-unseen"):
        hub.add(name, files)
    online(load, "any/silent")
    with Client(hub.environment() | {"HF_ENDPOINT": "http://127.0.0.1:9"}) as cut_off:
        assert cut_off(load, "any/silent") == expected
        with pytest.raises(Raised, match="any/silent-unseen is not in the cache.*cannot be reached") as raised:
            cut_off(load, "any/silent-unseen")
    assert "SourceNotFound" in raised.value.kinds


def test_a_repository_of_pickles_is_refused_with_the_command_that_converts_them(hub, online, saved):
    config = saved["model 1"][0]["config.json"]
    pickles = {"optimizer.pt": b"pickle", "pytorch_model.bin": b"pickle"}
    hub.add("any/pickles", {"config.json": config, **pickles})
    hub.requests.clear()
    with pytest.raises(Raised, match=r"pytorch_model\.bin, a pickle.*nanovlm convert") as raised:
        online(load, "any/pickles")
    assert "WeightsError" in raised.value.kinds
    assert not resolved(hub) & set(pickles)


def test_offline_what_was_never_fetched_is_said_to_be_missing_from_the_cache(hub, online, offline, saved):
    files, _ = saved["model 1"]
    hub.add("any/config-only", files)
    online(bare, "hf_hub_download", "any/config-only", "config.json")
    for repo in ("any/config-only", "any/never-seen"):
        with pytest.raises(Raised, match="(?i)cache.*HF_HUB_OFFLINE") as raised:
            offline(load, repo)
        assert "SourceNotFound" in raised.value.kinds
        assert repo in raised.value.message


@pytest.mark.parametrize(
    ("repo", "revision", "named"),
    [
        ("any/nothing", None, ["any/nothing"]),
        ("any/nothing", "v9", ["any/nothing", "v9"]),
        ("any/known", "v9", ["any/known", "v9"]),
        ("any/known", None, ["any/known", "model.safetensors"]),
        (f"{USER}/two..dots", None, [f"{USER}/two..dots"]),
    ],
    ids=["repository", "repository at a revision", "revision", "weights", "impossible name"],
)
def test_what_does_not_exist_is_named_in_our_own_error(hub, online, saved, repo, revision, named):
    hub.add("any/known", {"config.json": saved["model 1"][0]["config.json"]})
    with pytest.raises(Raised) as raised:
        online(load, repo, revision)
    assert "SourceNotFound" in raised.value.kinds
    assert [name for name in named if name not in raised.value.message] == []


def test_a_private_repository_is_not_loaded_without_its_owners_token(hub, online, saved):
    files, expected = saved["model 1"]
    hub.add(f"{USER}/hidden", files, private=True)
    with pytest.raises(Raised, match="private") as raised:
        online(load_as_stranger, f"{USER}/hidden")
    assert "SourceNotFound" in raised.value.kinds
    assert online(load, f"{USER}/hidden") == expected


@pytest.mark.parametrize("private", [True, False], ids=["private", "public"])
def test_a_pushed_model_has_a_card_and_lfs_weights_and_loads_again_equal(hub, online, saved, tmp_path, private):
    files, expected = saved["model 1"]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    repo = f"{USER}/pushed-{private}"
    online(push, str(tmp_path), repo, private)
    assert hub.repos[repo].private is private
    there = hub.repos[repo].at("main").files
    assert {"config.json", "model.safetensors", "README.md"} <= set(there)
    assert [name for name, file in there.items() if file.lfs] == ["model.safetensors"]
    assert online(load, repo) == expected
    _, front, text = there["README.md"].data.decode().split("---\n", 2)
    assert "library_name: nanovlm" in front and repo in text


def test_a_second_push_to_a_repository_adds_a_commit(hub, online, saved, tmp_path):
    for number, (files, expected) in enumerate(saved.values()):
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        online(push, str(tmp_path), f"{USER}/pushed-twice", False)
        assert online(load, f"{USER}/pushed-twice") == expected
        assert len(hub.repos[f"{USER}/pushed-twice"].branches["main"]) == 2 + number  # the first makes it


@pytest.mark.parametrize(
    ("repo", "network", "says"),
    [
        ("somebody/model", "online", ["rights to write under the namespace somebody", "hf auth login"]),
        (f"{USER}/two..dots", "online", ["..", "check the name"]),
        (f"{USER}/model", "offline", ["unset HF_HUB_OFFLINE"]),
    ],
    ids=["foreign namespace", "impossible name", "offline"],
)
def test_a_push_that_the_hub_does_not_take_is_our_own_error_with_its_reason(
    hub, request, saved, tmp_path, repo, network, says
):
    for name, data in saved["model 1"][0].items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(Raised) as raised:
        request.getfixturevalue(network)(push, str(tmp_path), repo, False)
    assert "UploadError" in raised.value.kinds and "NanoVLMError" in raised.value.kinds
    assert [words for words in [repo, *says] if words not in raised.value.message] == []
    assert repo not in hub.repos


def test_backbones_are_loaded_from_repositories_that_transformers_wrote(hub, online, tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, SiglipConfig, SiglipModel

    from nanovlm import VisionLanguageModel, preset

    cfg = preset("tiny")
    vision = {
        "hidden_size": cfg.vit_hidden_dim, "intermediate_size": cfg.vit_inter_dim,
        "num_hidden_layers": cfg.vit_n_blocks, "num_attention_heads": cfg.vit_n_heads,
        "image_size": cfg.vit_img_size, "patch_size": cfg.vit_patch_size,
    }  # fmt: skip
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    language = {
        "hidden_size": cfg.lm_hidden_dim, "intermediate_size": cfg.lm_inter_dim,
        "num_hidden_layers": cfg.lm_n_blocks, "num_attention_heads": cfg.lm_n_heads,
        "num_key_value_heads": cfg.lm_n_kv_heads, "vocab_size": cfg.lm_base_vocab_size,
        "rms_norm_eps": cfg.lm_rms_eps, "rope_theta": cfg.lm_re_base, "tie_word_embeddings": True,
        "max_position_embeddings": cfg.lm_max_position_embeddings,
    }  # fmt: skip
    siglip = SiglipModel(SiglipConfig(vision_config=vision, text_config=text | {"vocab_size": 16})).eval()
    llama = LlamaForCausalLM(LlamaConfig(**language)).eval()
    for name, theirs in (("siglip", siglip), ("llama", llama)):
        theirs.save_pretrained(tmp_path / name)
        hub.add(f"any/{name}", {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    online(load_backbones, "any/siglip", "any/llama", str(tmp_path / "ours"))
    ours = VisionLanguageModel.from_pretrained(str(tmp_path / "ours")).eval()
    pixels, ids = torch.rand(2, 3, cfg.vit_img_size, cfg.vit_img_size), torch.arange(24).view(2, 12)
    with torch.no_grad():
        features = siglip.vision_model(pixel_values=pixels).last_hidden_state
        torch.testing.assert_close(ours.vision_encoder(pixels), features, atol=1e-5, rtol=0)
        logits = ours(ids, None)[0][..., : cfg.lm_base_vocab_size]  # the rows after are the extra tokens
        torch.testing.assert_close(logits, llama(ids).logits, atol=1e-5, rtol=0)


def test_the_tokenizer_of_a_repository_gives_the_ids_of_its_tokenizer_json(hub, online):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate([*symbols, "th", "the", "Ġthe", "Ġt"])}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "t")]
    theirs = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "unk_token": "<|endoftext|>"}
    files = {"tokenizer.json": theirs.to_str(), "tokenizer_config.json": json.dumps(settings)}
    hub.add("any/tokenizer", {name: text.encode() for name, text in files.items()})
    for text in ("the cat, then\n\n12 to the 3rd", "été\u3000the"):
        assert online(encode, "any/tokenizer", text) == theirs.encode(text).ids
