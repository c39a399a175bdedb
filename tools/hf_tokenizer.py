"""Our tokenizers as Hugging Face's tokenizer.json and the files beside it."""

import json
import re
from pathlib import Path
from typing import Any

from runtime.errors import UserError, optional
from runtime.files import write_text
from text.examples import END
from text.tokenizer import Tokenizer, copy_tokenizer, json_object

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
