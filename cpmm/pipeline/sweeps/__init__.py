"""The sweep: its plan, its inputs, its records, its run on Ray and its table, one file each."""
