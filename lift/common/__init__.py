"""What every room shares: errors, files, settings, the drop ledger. The only part of `lift` that `lmm` imports."""
