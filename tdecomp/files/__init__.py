"""Files written wholly or not at all: data of known types, tensors with a hash, shards."""
