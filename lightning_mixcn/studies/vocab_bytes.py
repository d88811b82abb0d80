"""The alphabet of byte-level tokenizers: a printable character for each byte (GPT-2's table)."""


def as_bytes(text: str) -> str:
    """Text as a byte-level tokenizer writes it: a printable character for each byte of its UTF-8 (GPT-2's table)."""
    return "".join(_CHARACTERS[byte] for byte in text.encode())


def is_partial(piece: str) -> bool:
    """Whether a piece of a byte-level tokenizer holds bytes that are no whole characters."""
    return all(character in BYTES for character in piece) and not is_text(bytes(map(BYTES.__getitem__, piece)))


def _characters_of_bytes() -> dict[int, str]:
    """Printable bytes of Latin-1 are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


_CHARACTERS = _characters_of_bytes()
BYTES = {character: byte for byte, character in _CHARACTERS.items()}


def is_text(encoded: bytes) -> bool:
    """Whether bytes are whole UTF-8 characters."""
    try:
        encoded.decode()
    except UnicodeDecodeError:
        return False
    return True


def is_character(piece: str) -> bool:
    """Whether a piece of a byte-level tokenizer is one whole character."""
    encoded = bytes(map(BYTES.__getitem__, piece))
    return is_text(encoded) and len(encoded.decode()) == 1
