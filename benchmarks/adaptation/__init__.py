"""Adaptation: the ledger and the sweeps around it, fine-tuning, throughput, memory, and what is predicted on paper."""
