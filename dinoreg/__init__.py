"""Pretrain vision transformers with registers, and find out how good they are."""
