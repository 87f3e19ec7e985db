"""Tokenizers beside weights: carried along whole, and bytes as a tokenizer of transformers with our ids."""

import json
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import transformers
from lm_eval.models.huggingface import HFLM
from public import VOCABULARY, pair
from published import TINY
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import fusiontree as ft
from fusiontree import pruning
from fusiontree.cli.prune import prune_apply, prune_simplify
from fusiontree.data import ByteTokenizer
from fusiontree.data.file_tokenizer import tokenizer_in
from fusiontree.data.tokenizer_files import tokenizer_files
from fusiontree.errors import FusionTreeError
from fusiontree.evaluation.harness import FusionTreeLM
from fusiontree.zoo import family_of
from fusiontree.zoo.directory import export_model, import_model
from fusiontree.zoo.hf import byte_level, tokenizer_of

WORDS = ["the cat sat on the mat and the dog sat by the door", "a cat and a dog"]
LAYERS = [{"mixer": {"kind": "attention", "heads": 2, "kv_heads": 1, "head_dim": 8}}, {}]
BYTES = ft.ModelSpec.parse({"vocab_size": 257, "width": 16, "layers": LAYERS})


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A llama with a tokenizer that was trained on a few words, and things beside it that stay there."""
    folder = tmp_path_factory.mktemp("theirs")
    pair("llama").theirs.save_pretrained(folder)
    found = Tokenizer(models.BPE(unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    found.train_from_iterator(WORDS, trainer)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    wrapped.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    wrapped.save_pretrained(folder)
    for name in ("tokenization_evil.py", "tokenizer.pkl", "training_args.bin"):
        (folder / name).write_text("raise SystemExit('ran')")
    return folder


def test_files_go_in_and_come_back_and_nothing_else_does(theirs, tmp_path):
    import_model(theirs, tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back", family_of("llama"))
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert {file.name for file in tokenizer_files(theirs)} == names
    assert {file.name for file in (tmp_path / "ours").iterdir()} == names | {"spec.yaml", "model.safetensors"}
    assert {file.name for file in (tmp_path / "back").iterdir()} == names | {"config.json", "model.safetensors"}
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (theirs / name).read_bytes()
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert again.encode("the cat sat") == transformers.AutoTokenizer.from_pretrained(theirs).encode("the cat sat")


def test_a_model_that_replaces_another_does_not_keep_its_tokenizer(theirs, tmp_path):
    bare = shutil.copytree(theirs, tmp_path / "bare", ignore=lambda *_: ["tokenizer.json", "tokenizer_config.json"])
    import_model(theirs, tmp_path / "ours")
    import_model(bare, tmp_path / "ours")
    names = {file.name for file in tokenizer_files(tmp_path / "ours")}
    assert names == {"chat_template.jinja", "generation_config.json"}


def test_pruning_takes_them_along(theirs, tmp_path):
    gated = {
        "kind": "gated",
        "branches": {"a": LAYERS[0]["mixer"], "b": LAYERS[0]["mixer"]},
        "gate": {"kind": "sigmoid"},
    }
    ft.save(ft.build(ft.ModelSpec.parse(BYTES.data() | {"layers": [{"mixer": gated}]})), tmp_path / "ours")
    shutil.copy(theirs / "tokenizer.json", tmp_path / "ours")
    plan = pruning.plan_by_hand(ft.load_spec(tmp_path / "ours"), ["layers.0.mixer.branches.b"])
    (tmp_path / "plan.json").write_text(plan.to_json())
    prune_apply(tmp_path / "ours", tmp_path / "plan.json", tmp_path / "pruned")
    prune_simplify(tmp_path / "pruned", tmp_path / "simple")
    for name in ("pruned", "simple"):
        assert (tmp_path / name / "tokenizer.json").read_bytes() == (theirs / "tokenizer.json").read_bytes()


@pytest.fixture(scope="module")
def byte_tokenizers(tmp_path_factory):
    """Read from what an export writes, and made in memory."""
    folder = tmp_path_factory.mktemp("bytes")
    ft.save(ft.build(BYTES), folder / "ours")
    export_model(folder / "ours", folder / "theirs", family_of("fusiontree"))
    assert transformers.AutoModelForCausalLM.from_pretrained(folder / "theirs").generation_config.eos_token_id == 256
    return [transformers.AutoTokenizer.from_pretrained(folder / "theirs"), byte_level()]


@pytest.mark.parametrize(
    "text",
    [
        "".join(map(chr, range(0x180))),
        "h\u00e9 \u4e16\u754c \U0001f600\u200d\U0001f525 e\u0301 \ufeff\u2028\x00\x7f",
        "  spaces,\ttabs\r\n\n and 'll don't .  ",
        "<|end|> is text, <s> and [PAD] too",
        "",
    ],
)
def test_ids_are_those_of_our_tokenizer(byte_tokenizers, text):
    ours = ByteTokenizer()
    for theirs in byte_tokenizers:
        assert theirs.encode(text) == theirs(text).input_ids == ours.encode(text).tolist()
        assert theirs.decode(theirs.encode(text)) == text


@pytest.mark.parametrize("name", TINY)
def test_every_family_s_export_of_a_byte_model_reads_text_as_we_do(tmp_path, name):
    ft.save(ft.build(ft.load_spec(name)), tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "theirs", family_of(TINY[name]["model_type"]))
    text = "h\u00e9 <|end|> a\n"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert theirs.encode(text) == list(text.encode()) and theirs.decode(theirs.encode(text)) == text


def test_any_bytes_read_as_ours_do(byte_tokenizers):
    drawn, ours = random.Random(0), ByteTokenizer()
    rows = [[byte] for byte in range(256)]
    rows += [[drawn.randrange(256) for _ in range(drawn.randrange(1, 12))] for _ in range(300)]
    for theirs in byte_tokenizers:
        assert len(theirs) == 257 and theirs.eos_token_id == theirs.bos_token_id == theirs.pad_token_id == 256
        for row in rows:
            assert theirs.decode(row) == ours.decode(np.array(row))
        assert theirs.decode([104, 256, 105], skip_special_tokens=True) == "hi"
        batch = theirs(["a", "\u00e9"], padding=True, padding_side="left")
        assert batch.input_ids == [[256, 97], [195, 169]] and batch.attention_mask == [[0, 1], [1, 1]]


def test_an_imported_model_scores_as_theirs_does(theirs, tmp_path):
    """lm-eval on transformers' own class, from its directory, and on ours."""
    import_model(theirs, tmp_path / "ours")
    pairs = [("the cat", " sat on the mat"), ("a dog", " and a cat"), ("", "the door")]
    requests = [SimpleNamespace(args=pair, task_name="pairs") for pair in pairs]
    wanted = HFLM(str(theirs), device="cpu").loglikelihood(requests)
    found = FusionTreeLM(str(tmp_path / "ours"), batch_size=3).loglikelihood(requests)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], rel=1e-5)


def test_a_tokenizer_that_does_not_fit_is_one_line(theirs, tmp_path):
    small = ft.ModelSpec.parse(BYTES.data() | {"vocab_size": 11})
    for name, change, line in (
        ("none", None, "holds no tokenizer, and 11 tokens are not the 257 of bytes"),
        ("large", (theirs / "tokenizer.json").read_text(), "the tokenizer has"),
        ("broken", "{", "its tokenizer cannot be read"),
        ("odd", json.dumps({"model": 3}), "its tokenizer cannot be read"),
    ):
        ft.save(ft.build(small), tmp_path / name)
        if change is not None:
            (tmp_path / name / "tokenizer.json").write_text(change)
        with pytest.raises(FusionTreeError, match=line) as caught:
            tokenizer_of(tmp_path / name, small)
        assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def bare(theirs, tmp_path_factory):
    """A model of ours with a tokenizer.json alone beside it."""
    folder = tmp_path_factory.mktemp("bare")
    import_model(theirs, folder / "ours")
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / "ours" / name).unlink()
    return folder / "ours"


def test_a_tokenizer_json_alone_says_where_texts_begin_and_end(bare, theirs):
    requests = [SimpleNamespace(args=pair, task_name="pairs") for pair in [("the cat", " sat"), ("", "the door")]]
    wanted, found = HFLM(str(theirs), device="cpu"), FusionTreeLM(str(bare), batch_size=2)
    assert (found.tokenizer.bos_token, found.tokenizer.eos_token) == ("<s>", "</s>")
    assert [v for v, _ in found.loglikelihood(requests)] == pytest.approx(
        [v for v, _ in wanted.loglikelihood(requests)], rel=1e-5
    )


def test_a_tokenizer_without_an_end_is_one_line_and_the_file_it_names_helps(bare, tmp_path):
    ours = shutil.copytree(bare, tmp_path / "ours")
    text = (ours / "tokenizer.json").read_text()
    (ours / "tokenizer.json").write_text(text.replace("<s>", "<a>").replace("</s>", "<b>"))
    with pytest.raises(FusionTreeError, match=r"no token is known to end a text; name one in generation_config.json"):
        FusionTreeLM(str(ours))
    (ours / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert FusionTreeLM(str(ours)).tokenizer.eos_token == "<b>"
    assert tokenizer_in(ours, VOCABULARY).ends == (2, 0)


def test_code_that_a_tokenizer_s_config_names_is_not_run(theirs, tmp_path):
    folder = shutil.copytree(theirs, tmp_path / "evil")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    spec = import_model(folder, tmp_path / "ours")
    shutil.copy(folder / "tokenization_evil.py", tmp_path / "ours")
    with pytest.raises(FusionTreeError, match="its tokenizer cannot be read"):
        tokenizer_of(tmp_path / "ours", spec)
