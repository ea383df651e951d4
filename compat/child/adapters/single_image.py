"""nanoVLM v0.1 and v0.2: ``image``, one square picture a row as one tensor (B, 3, S, S).

v0.1 puts the features in front of the text, v0.2 where the text holds image tokens; which one it is
shows in whether there is an image token. Early versions only sample, without a cache.
"""

from ..protocol import NotSupported
from .base import Adapter as Base
from .configs import signature_names


class Adapter(Base):
    dialect = "single_image"
    FORMS = ("one tensor", "list of 3-D tensors", "list of 4-D tensors", "nested lists")

    @classmethod
    def speaks(cls, subject):
        return "image" in signature_names(subject.model_class.forward)

    def batch(self, rows, padding="left"):
        counts = {len(row.get("images", ())) for row in rows}
        if counts not in ({1}, {0}):  # none at all is image=None, which some versions understand
            raise NotSupported("this layout takes exactly one image a row")
        return super().batch(rows, padding)
