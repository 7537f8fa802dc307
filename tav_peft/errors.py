"""The errors a user can cause; their text says what was given, what is allowed, and the fix."""


class TavError(Exception):
    """Base of everything this library raises on purpose."""


class ClipError(TavError):
    """A video cannot be read, is too short, or cannot be written."""


class AdapterError(TavError):
    """An adapter file is damaged, foreign, or does not fit the base."""


class BaseModelError(TavError):
    """A base model cannot be found, read, or inflated."""


class RecipeError(TavError):
    """A recipe or an override has unknown or impossible values."""


class TuningError(TavError):
    """Tuning cannot start, resume, or go on."""
