"""A scaled model as files that stock engines load."""

from lrs_utils.export.folder import Exported, export
from lrs_utils.export.gguf_file import export_gguf

__all__ = ["Exported", "export", "export_gguf"]
