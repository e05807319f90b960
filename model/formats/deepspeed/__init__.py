"""DeepSpeed's checkpoint folders, ZeRO 0 to 3 and universal."""
