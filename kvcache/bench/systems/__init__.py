"""The whole system beside the ones that its users would run instead: `kvcache bench peers`."""
