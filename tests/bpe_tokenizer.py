"""Trains a small byte-level BPE of the kind that DeepSeek-V3 has."""

from mla_moe.data import tokenizer

SPECIAL = (tokenizer.BOS, tokenizer.EOS, '<｜▁pad▁｜>', *tokenizer.FIM)

# The splits that DeepSeek-V3's tokenizer.json makes before merging: digits by
# threes, runs of Chinese and Japanese, then words, punctuation and spaces.
SPLITS = (
  r'\p{N}{1,3}',
  r'[一-龥぀-ゟ゠-ヿ]+',
  r'[!"#$%&\'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+'
  r'|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*'
  r'|\s*[\r\n]+|\s+(?!\S)|\s+',
)


def write(path, texts, vocab):
  """Writes a tokenizer.json of at most `vocab` tokens; bos is 0, eos is 1."""
  import tokenizers
  from tokenizers import pre_tokenizers

  core = tokenizers.Tokenizer(tokenizers.models.BPE())
  core.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(split), 'isolated')
      for split in SPLITS
    ]
    + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
  )
  core.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab,
    special_tokens=list(SPECIAL),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  core.train_from_iterator(texts, trainer)
  core.save(str(path))
