"""The texts of a page in English and Chinese, and which of them a visitor's browser wants. It loads no library."""


def by_language(words: dict[str, tuple[str, str]]) -> dict[str, dict[str, str]]:
    """{"en", "zh-CN": {name: text}} of {name: (English, Chinese)}."""
    return {code: {name: texts[place] for name, texts in words.items()} for place, code in enumerate(("en", "zh-CN"))}


def is_chinese(request) -> bool:
    """True where the first language of a request's Accept-Language is Chinese."""
    return request.headers.get("accept-language", "").lower().startswith("zh")


def in_language_of(request, texts: dict) -> dict[str, str]:
    """The texts of by_language() in the language of a visitor's browser."""
    return texts["zh-CN" if is_chinese(request) else "en"]
