"""The factorised video transformer of Open-Sora v1 (STDiT), made causal: ViD-GPT and Ca2-VDM."""
