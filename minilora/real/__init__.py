"""Real pre-trained models, opened from their files and adapted by the methods of the book.

    model, tokenizer = minilora.real.open_model("SmolLM2-135M-Instruct.Q4_1.gguf")

It needs what the book does not: `pip install "minilora[real]"`. `python -m minilora.real` shows it.
"""

from .models import Bert, Llama, gpt2
from .text import Tokenizer
from .files import open_model
from .peft_files import export_peft, import_peft, save_pretrained
