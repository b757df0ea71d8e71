"""What the hostile tests share with those of whole runs."""

from tests.end_to_end.conftest import cache, shop

__all__ = ["cache", "shop"]
