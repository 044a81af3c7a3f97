"""Makes tokenizer.json: byte-level BPE in which answers are single tokens and names are not."""

from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from mechunlearn.tasks import formats
from mechunlearn.testbed.loading import BOS, PAD
from testbed import corpus


def train(vocab_size: int = 3328) -> Tokenizer:
    """A tokenizer that puts BOS first; words of prompts, text and answers are frequent, names are rare."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def _texts() -> Iterator[str]:
    """The words to merge first are the ones repeated most."""
    people, facts = corpus.athletes(), corpus.general_knowledge()
    words = {fact.answer for fact in facts}
    words |= {value for p in people for value in (p.sport, p.sport.capitalize(), p.position, p.city)}
    words |= {*formats.LETTERS, "yes", "no"}
    prompts = [formats.FACT, formats.SYSTEM, formats.MULTIPLE_CHOICE, formats.SPORT_QUESTION]
    prompts += formats.PARAPHRASES.values()
    prompts += [text for phrasings in formats.ATTRIBUTES.values() for text in phrasings.values()]
    prompts += ["In the register:", "Question: Do and play the same sport?\nAnswer:"]
    for text in prompts:
        yield from [text.replace("{athlete}", "")] * 50
    for word in sorted(words):
        yield from [f" {word}"] * 50
    for fact in facts:
        yield from [document.text for document in corpus.knowledge_documents(fact)]
    yield from corpus.held_out_text(200, seed=1)
    yield from [f" {athlete.name}" for athlete in people]
