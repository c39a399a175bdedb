"""A rank file of one's own: byte-pair ranks trained on the first increment."""

import base64
import os

from runtime.errors import UserError
from runtime.files import write_text
from text.prepare import hashes
from text.sources import all_documents, local_files, optional
from text.token_files import new_path
from text.tokenizer import PATTERN


def vocab(out: str, sources: list[str], size: int, increments: list[float], val: float) -> None:
    """Train `size` - 1 byte-pair ranks (<|endoftext|> is the last id) on the first increment alone.

    increments, val: the split of `prepare`, so that the later increments stay unseen.
    """
    file = new_path(out)
    if size < 257:
        raise UserError(f"--vocab_size: got {size}, expected 257 (256 bytes and <|endoftext|>) or more")
    local_files(sources)
    parent = next(p for p in file.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):  # said before the training, not after it
        raise UserError(f"--out {file}: cannot be written; choose another one")
    rustbpe = optional("rustbpe", "rustbpe", "data.py vocab")
    low, high = val * 2**64, (val + (1 - val) * increments[0] / sum(increments)) * 2**64
    trainer = rustbpe.Tokenizer()
    texts = (text for _, text in all_documents(sources) if low <= hashes(text)[0] < high)
    trainer.train_from_iterator(texts, size - 1, pattern=PATTERN)
    ranks = sorted(trainer.get_mergeable_ranks(), key=lambda r: r[1])
    if len(ranks) < size - 1:
        raise UserError(
            f"--vocab_size: got {size}, expected at most the {len(ranks) + 1} of the first increment's text"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(f"{base64.b64encode(bytes(token)).decode()} {rank}\n" for token, rank in ranks))
    print(f"{out}: {len(ranks):,} ranks, a vocabulary of {size:,} with <|endoftext|>")
