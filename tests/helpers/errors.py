"""What the tests of refusals share."""

import pytest

REFUSED = (RuntimeError, TypeError, ValueError)


def refused(words, kind=REFUSED):
    """An error whose text has all the words."""

    class Check:
        def __enter__(self):
            self.raises = pytest.raises(kind)
            self.info = self.raises.__enter__()
            return self.info

        def __exit__(self, *exception):
            suppressed = self.raises.__exit__(*exception)
            for word in words:
                assert word in str(self.info.value), f"{word!r} is not in: {self.info.value}"
            return suppressed

    return Check()
