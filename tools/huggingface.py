"""A released Llama or Qwen2 as our checkpoint, and any checkpoint of ours as a folder for Hugging Face's transformers.

    python -m tools.huggingface import FOLDER --out out/NAME       import/step-000000/, tokenizer/ and model.toml
    python -m tools.huggingface export CHECKPOINT --out FOLDER     model.safetensors, config.json and tokenizer.json

Weights are carried over bit for bit, in float32 (which holds bfloat16 and float16). Nothing that is read is executed.
"""

import json
import shlex
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import config
from eval import load_model
from runtime import checkpoint, resume
from runtime.command_line import Parser
from runtime.errors import UserError, user_errors
from runtime.files import make_folder, sha256, write_text
from text.examples import held_messages
from text.tokenizer import Tokenizer, copy_tokenizer
from tools.hf_model import SERVED, find_tensors, from_config, read_weights, to_config, to_hf
from tools.hf_tokenizer import check_tokenizer, write_tokenizer

CONTEXT = 2048  # tokens of a sequence in model.toml, at most: longer ones take more memory


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
    print(f"{where}: {m.parameters:,} parameters, {len(files)} tensors of {folder}; a config for it: model.toml")
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
