"""A scaled model as files that stock engines load."""

from lrs_utils.export.folder import Exported, export

__all__ = ["Exported", "export"]
