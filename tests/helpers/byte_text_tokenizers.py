"""The trivial text tokenizers of the golden conversations: bytes, and a few special tokens."""

import re


class SpecialBytes:
    """Bytes shifted by an offset; special tokens in text are one id each.

    Attributes:
      special: text -> id.
    """

    def __init__(self, offset, special, start=None, end=None):
        self.offset, self.special = offset, special
        self.bos_token_id = special.get(start)
        self.eos_token_id = special.get(end)
        self.pad_token_id = None

    def __len__(self):
        return max(256 + self.offset, max(self.special.values()) + 1)

    def encode(self, text, add_special_tokens=True):
        start = add_special_tokens and self.bos_token_id is not None
        ids = [self.bos_token_id] if start else []
        for piece in re.split(f"({'|'.join(map(re.escape, self.special))})", text):
            special = piece in self.special
            ids += [self.special[piece]] if special else [b + self.offset for b in piece.encode()]
        return ids

    def decode(self, ids, skip_special_tokens=False):
        names = {i: name for name, i in self.special.items()}
        parts = []
        for i in map(int, ids):
            if i in names:
                parts.append(b"" if skip_special_tokens else names[i].encode())
            else:
                parts.append(bytes([i - self.offset]))
        return b"".join(parts).decode(errors="replace")


LLAMA_LIKE = SpecialBytes(3, {"<unk>": 0, "<s>": 1, "</s>": 2}, "<s>", "</s>")
QWEN_LIKE = SpecialBytes(
    188, {"<|endoftext|>": 444, "<|im_start|>": 445, "<|im_end|>": 446}, end="<|im_end|>"
)


def golden_tokenizer(name, template):
    """The tokenizer that a golden case calls `name`."""
    if name == "bytes_no_bos" or (name == "bytes" and template == "qwen_2_5"):
        return QWEN_LIKE
    return LLAMA_LIKE
