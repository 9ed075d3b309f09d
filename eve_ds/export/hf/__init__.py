"""EVE as transformers classes: `AutoModel` and `AutoProcessor` load the folders that `export_hf` writes.

    import eve_ds.export.hf
    model = AutoModel.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)

Importing this package registers the classes.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

from eve_ds.export.hf.config import EveConfig
from eve_ds.export.hf.folder import check_out, export_hf
from eve_ds.export.hf.image_processor import EveImageProcessor
from eve_ds.export.hf.model import EveModel, EveModelOutput
from eve_ds.export.hf.processor import EveProcessor

__all__ = ["EveConfig", "EveImageProcessor", "EveModel", "EveModelOutput", "EveProcessor", "check_out", "export_hf"]

AutoConfig.register(EveConfig.model_type, EveConfig)
AutoModel.register(EveConfig, EveModel)
AutoImageProcessor.register(EveConfig, slow_image_processor_class=EveImageProcessor)
AutoProcessor.register(EveConfig, EveProcessor)
