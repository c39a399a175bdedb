"""A released Llama or Qwen2 as our checkpoint, and any checkpoint of ours as a folder for Hugging Face's transformers.

    python -m tools.huggingface import FOLDER --out out/NAME       import/step-000000/, tokenizer/ and model.toml
    python -m tools.huggingface export CHECKPOINT --out FOLDER     model.safetensors, config.json and tokenizer.json

Weights are carried over bit for bit, in float32 (which holds bfloat16 and float16). Nothing that is read is executed.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import config
from eval import load_model
from runtime import checkpoint, resume
from runtime.command_line import Parser
from runtime.errors import UserError, optional, user_errors
from runtime.files import make_folder, sha256, write_text
from text.examples import END, held_messages
from text.tokenizer import Tokenizer, copy_tokenizer, json_object
from tools.hf_model import SERVED, find_tensors, from_config, read_weights, to_config, to_hf

CONTEXT = 2048  # tokens of a sequence in model.toml, at most: longer ones take more memory
# ChatML: role and content of each message
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# texts that tell wrong patterns and ranks
SAMPLES = [
    "The whale, 1234567 miles; naïve café — 鲸鱼在海里。",
    "\n\n  def f(x):\r\n\treturn x  \n",
    "I'LL DON'T we've <|endoftext|>" + " " * 70,
    "a\0🙂é\u0301" + "x=" * 200,
]

# ---- Our tokenizers as tokenizer.json and the files beside it --------------------------------------------------------


def plain_pattern(pattern: str) -> str:
    """tiktoken's pattern for Oniguruma, where {1,3}+ repeats a repetition, and $ is the end of any line."""
    # they match the same without possessive quantifiers: no part begins with a character of the part before
    return re.sub(r"([?*+]|\{\d+,?\d*\})\+", r"\1", pattern).replace("$", r"\z")


def to_tokenizer_json(tok: Tokenizer) -> dict[str, Any]:
    """tokenizer.json of `bytes`, an encoding or a rank file: byte-level BPE."""
    library = optional("tokenizers", "tokenizers", "tokenizer.json")
    ranks = dict(sorted(tok.encoding._mergeable_ranks.items(), key=lambda item: item[1]))
    # GPT-2's printable character for each byte: the byte's own if it has one, else the next from U+0100 on
    printable, others = [*range(33, 127), *range(161, 173), *range(174, 256)], iter(range(256, 512))
    char = [chr(b if b in printable else next(others)) for b in range(256)]
    spelled = {token: token.decode("latin-1").translate(char) for token in ranks}
    merges = []  # BPE ranks pairs, tiktoken the merged tokens: all pairs that make a token stand together, at its rank
    for token in ranks:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += [(spelled[a], spelled[b]) for a, b in sorted(cuts, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))]
    # special tokens too, so that ids stay if there are gaps; text never becomes one, as the pattern cuts it
    added = dict(sorted(tok.encoding._special_tokens.items(), key=lambda item: item[1]))
    vocab = {spelled[token]: rank for token, rank in ranks.items()} | added
    plain = tok.name == "bytes"
    # a token that is a whole word is taken at once (ignore_merges), as tiktoken does
    made = library.Tokenizer(library.models.BPE(vocab, merges, ignore_merges=not plain))
    before = [library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if not plain:
        regex = library.Regex(plain_pattern(tok.encoding._pat_str))
        before.insert(0, library.pre_tokenizers.Split(regex, "isolated"))
    made.pre_tokenizer = library.pre_tokenizers.Sequence(before)
    made.decoder = library.decoders.ByteLevel()
    made.add_special_tokens([library.AddedToken(text, normalized=False) for text in added])
    return json.loads(made.to_str())


def end_ids(tok: Tokenizer, chat: bool) -> list[int]:
    """Ids that end an answer: as an imported generation_config.json says, but ours after training on messages."""
    if chat:
        return [tok.eot, tok.markers[END]] if tok.markers else [tok.eot]
    file = Path(tok.name) / "generation_config.json"
    found = json_object(file).get("eos_token_id", tok.eot) if tok.is_folder else tok.eot
    return [i for i in (found if isinstance(found, list) else [found]) if type(i) is int]


def write_tokenizer(tok: Tokenizer, folder: Path, chat: bool) -> None:
    """Write the tokenizer as AutoTokenizer reads it, an imported one with its files; `chat`: with our template."""
    if tok.is_folder:
        copy_tokenizer(Path(tok.name), folder)
    else:
        write_text(folder / "tokenizer.json", json.dumps(to_tokenizer_json(tok), ensure_ascii=False))
    end = tok.hf.id_to_token(tok.eot) if tok.hf else "<|endoftext|>"
    made: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "model_max_length": 10**30}
    made |= {"clean_up_tokenization_spaces": False}
    settings = json_object(folder / "tokenizer_config.json") or made  # an imported one's go first
    made = {"bos_token_id": None, "eos_token_id": tok.eot, "pad_token_id": tok.eot}
    generation = json_object(folder / "generation_config.json") or made
    if chat:
        (folder / "chat_template.jinja").unlink(missing_ok=True)  # it would go before the one in the config
        settings["chat_template"] = CHATML
        generation["eos_token_id"] = end_ids(tok, chat)
    write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=1))
    write_text(folder / "generation_config.json", json.dumps(generation, indent=1))


def check_tokenizer(tok: Tokenizer, folder: Path) -> None:
    """UserError if a written tokenizer gives other ids than `tok`, or the package tokenizers is missing."""
    written = Tokenizer(str(folder))
    for sample in SAMPLES:
        if written.encode(sample) != tok.encode(sample) or written.eot != tok.eot:
            raise UserError(f"{tok.name}: cannot be exported: tokenizer.json gives other ids for {sample[:40]!r}")


# ---- Models ----------------------------------------------------------------------------------------------------------


def import_model(source: str, out: str) -> Path:
    """Import a folder; returns the checkpoint. UserError, and nothing is written, if not all of it can be served."""
    folder, target = Path(source), Path(out)
    with make_folder(target) as work:
        m = from_config(folder / "config.json")
        files = find_tensors(folder, m)
        tok = Tokenizer(source)
        if tok.vocab_size > m.vocab_size:
            got = f"has ids to {tok.vocab_size - 1}, expected below the {m.vocab_size} rows of the model"
            raise UserError(f"{folder / 'tokenizer.json'}: {got}; it is another model's")
        checkpoint.check_space(target.parent, 4 * m.parameters)
        c = config.Config(out=out, model=m)
        c.data.path = str(target / "tokenizer")
        copy_tokenizer(folder, work / "tokenizer")
        (work / "import").mkdir()
        weights = {f"model.{name}": t for name, t in read_weights(m, files).items()}
        # a finished version 1, trained on no data of ours
        state = {"version": 1, "path": {}, "finished": True, "pinned": True, "parent": None, "tokens": 0}
        made = {"config": config.values(c), "versions": {"torch": torch.__version__}, "segment": resume.IMPORT}
        data = {"tokenizer": tok.sha256, "increments": []}
        checkpoint.save(work / "import", 0, weights, {**made, **state, "data": data})
        write_text(work / "model.toml", model_toml(c, source))
    where = checkpoint.path(target / "import", 0)
    print(f"{where}: {m.parameters:,} parameters, {len(files)} tensors of {folder}")
    print(f"Go on with: python train.py --config {shlex.quote(str(target / 'model.toml'))} --mode main")
    return where


def model_toml(c: config.Config, source: str) -> str:
    """A config for train.py --config that goes on from the import `c`, which becomes it."""
    about = f"huggingface import of {json.dumps(source)}, for sequences of at most {c.model.context} tokens; its data:"
    prepare = f"python data.py prepare --out .. --tokenizer {shlex.quote(c.data.path)} --source .."
    c.data.path = f"data/{Path(c.out).name}"
    c.plan.max_lr = 1e-4  # of a model that has learned already
    c.model.context = min(c.model.context, CONTEXT)
    c.train.batch_tokens, c.train.micro_batch = c.model.context * max(1, 65536 // c.model.context), 1
    c.train.base = str(checkpoint.path(Path(c.out) / resume.IMPORT, 0))  # in place of random weights
    return f"# {about}\n# {' '.join(prepare.splitlines())}\n{config.to_toml(c)}"


def export_model(source: str, out: str, data: str | None = None) -> Path:
    """Export a checkpoint; returns the folder. If it or its tokenizer is damaged: UserError, and nothing is written."""
    path, target = Path(source), Path(out)
    with make_folder(target) as work:
        meta = checkpoint.read_meta(path)
        tok = resume.open_tokenizer(path, meta, data)
        net, _ = load_model(path, torch.device("cpu"))
        c = net.config
        checkpoint.check_space(target.parent, 4 * c.parameters)
        chat = held_messages(meta["data"])
        write_tokenizer(tok, work, not tok.is_folder if chat is None else chat)  # None: an older one does not say
        tensors = to_hf(c, {name: p.detach() for name, p in net.named_parameters()})
        try:
            save_file(tensors, work / "model.safetensors", {"format": "pt"})
        except SafetensorError as e:  # an error of the disk
            raise UserError(f"{target / 'model.safetensors'}: cannot be written ({e})") from None
        origin = {"tokenizer": meta["data"]["tokenizer"], "tokenizer_json": sha256(work / "tokenizer.json")}
        origin |= {k: meta[k] for k in ("segment", "step", "version", "hash")}
        settings = to_config(c) | {"bos_token_id": None, "eos_token_id": tok.eot, "torch_dtype": "float32"}
        write_text(work / "config.json", json.dumps({**settings, "pathswitch": origin}, indent=1))
        check_tokenizer(tok, work)
    print(f"{target}: {c.parameters:,} parameters of {path} as {settings['architectures'][0]}")
    return target


def main() -> None:
    a = Parser(prog="huggingface", description=__doc__)
    a.add_argument("verb", choices=("import", "export"))
    a.add_argument("path", help=f"import: a folder of {' or '.join(SERVED)} by save_pretrained; export: a checkpoint")
    a.add_argument("--out", required=True, help="a new folder")
    a.add_argument("--data", help="export: a prepared folder with its tokenizer [the one that it was trained on]")
    o = a.parse_args()
    if o.verb == "export":
        export_model(o.path, o.out, o.data)
    elif o.data:
        raise UserError(f"--data: got {o.data}, which only export reads; leave it out")
    else:
        import_model(o.path, o.out)


if __name__ == "__main__":
    with user_errors("huggingface"):
        main()
