"""A scaled model as files that stock engines load."""

from lrs_utils.export.folder import Exported, export
from lrs_utils.export.forms import FORMS

__all__ = ["FORMS", "Exported", "export"]
