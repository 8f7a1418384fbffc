"""Real models, and adapters in the files that other tools read: a job beside the book."""

from .peft_files import export_peft, import_peft, open_opt, save_pretrained
