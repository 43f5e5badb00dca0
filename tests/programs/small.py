"""What the programs train: tiny models with random weights, a tokenizer made here, and sentences that can be learnt."""

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

SEQ = 32

_WHO = ("the cat", "a dog", "my friend", "the old king", "one small bird")
_DOES = ("sees", "likes", "finds", "paints")
_WHAT = ("the red house", "a tree", "the long road to town", "music in the evening")
SENTENCES = [f"{who} {does} {what}" for who in _WHO for does in _DOES for what in _WHAT]

CHAT = (
    "{% for message in messages %}<|{{ message.role }}|> "
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }} <end>{% endgeneration %} "
    "{% else %}{{ message.content }} <end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def tokenizer() -> Any:
    """A word is a token."""
    specials = ["<pad>", "<unk>", "<end>", "<|user|>", "<|assistant|>"]
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.train_from_iterator(
        [*SENTENCES, "who does what and"], tokenizers.trainers.WordLevelTrainer(special_tokens=specials)
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<end>", chat_template=CHAT
    )


def llama(**config: Any) -> Any:
    """Four layers, with dropout, so that a resumed run needs torch's random state as well."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=128,
            pad_token_id=0,
            eos_token_id=2,
            **{"attention_dropout": 0.1, **config},
        )
    )


def texts(first: int = 0, count: int = 48) -> Any:
    """Rows of one to three sentences, so that batches are padded."""
    rows = [
        " and ".join(SENTENCES[(7 * i + j) % len(SENTENCES)] for j in range(1 + i % 3))
        for i in range(first, first + count)
    ]
    return datasets.Dataset.from_dict({"text": rows})


def tokens(first: int = 0, count: int = 48) -> Any:
    """The same as token ids and labels, all padded to one length with the labels of padding ignored."""
    words = tokenizer()

    def encode(row: dict[str, str]) -> dict[str, Any]:
        found = words(row["text"], padding="max_length", max_length=SEQ)
        kept = zip(found["input_ids"], found["attention_mask"], strict=True)
        return {**found, "labels": [token if real else -100 for token, real in kept]}

    return texts(first, count).map(encode, remove_columns="text")


def conversations(first: int = 0, count: int = 48) -> Any:
    """Of one or two turns."""

    def turn(i: int) -> list[dict[str, str]]:
        who, what = _WHO[i % 5], SENTENCES[(16 * (i % 5) + i) % len(SENTENCES)]
        return [{"role": "user", "content": f"who does what {who}"}, {"role": "assistant", "content": what}]

    rows = [[message for j in range(1 + i % 2) for message in turn(i + j)] for i in range(first, first + count)]
    return datasets.Dataset.from_dict({"messages": rows})


def preferences(first: int = 0, count: int = 48) -> Any:
    """Two answers to a prompt, the chosen one the longer."""
    rows = [
        {
            "prompt": f"who does what {_WHO[i % 5]} ",
            "chosen": f"{_DOES[i % 4]} {_WHAT[2 + i % 2]}",
            "rejected": f"{_DOES[(i + 1) % 4]} {_WHAT[1]}",
        }
        for i in range(first, first + count)
    ]
    return datasets.Dataset.from_list(rows)


def bert() -> Any:
    """As :func:`llama`, an encoder."""
    torch.manual_seed(0)
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=128,
        )
    )


def pairs(first: int = 0, count: int = 48) -> Any:
    """A sentence, and one of the same subject."""

    def about(who: int, does: int) -> str:
        return SENTENCES[16 * (who % 5) + does % 16]

    rows = [{"anchor": about(i, i), "positive": about(i, i + 5)} for i in range(first, first + count)]
    return datasets.Dataset.from_list(rows)
