"""Options of search.run with values that cannot be."""

from __future__ import annotations

from experiments.bad_inputs.case import Case, search

_LONG = "9" * 5000

SIZES: tuple[Case, ...] = (
    search("a budget without a unit", "--budget 103", "--budget", "'103' is not a size", "103GB or 96GiB"),
    search("an empty budget", ["--budget", ""], "--budget", "is not a size"),
    search("a negative budget", ["--budget", "-1GB"], "--budget"),
    search("a budget of zero", "--budget 0GB", "--budget", "write a positive number"),
    search("a budget that is no number", "--budget nanGB", "--budget", "'nanGB' is not a size"),
    search("an infinite budget", "--budget infGB", "--budget", "'infGB' is not a size"),
    search("a budget in scientific notation", "--budget 1e3MB", "--budget", "'1e3MB' is not a size"),
    search("a budget of 5000 digits", ["--budget", f"{_LONG}GB"], "--budget", "is not a size"),
    search("a budget in full-width digits", ["--budget", "３MB"], "--budget", "is not a size"),
    search("a budget with a terminal's control codes", ["--budget", "3\x1b[2JMB"], "--budget", "\\x1b[2J"),
    search("a budget in two lines", ["--budget", "3MB\n4MB"], "--budget", "is not a size"),
    search("a budget and no number after it", ["--budget"], "--budget", "expected one argument"),
    search("a budget above the whole model", "--budget 9GB", "--budget 9.00 GB is above the whole model"),
    search(
        "a budget below the smallest config", "--budget 1KB",
        "--budget 1.00 KB is below the smallest possible config", "raise --budget",
    ),
    search(
        "a budget above the device's memory", "--device-memory 2MB",
        "--budget 3.00 MB does not fit the device",
        "raise --device-memory",
    ),
    search("a device memory without a unit", "--device-memory 96", "--device-memory", "'96' is not a size"),
    search("an empty device memory", ["--device-memory", ""], "--device-memory", "is not a size"),
    search("a negative device memory", ["--device-memory=-1GB"], "--device-memory", "'-1GB' is not a size"),
    search("a device memory of zero", "--device-memory 0.0GB", "--device-memory", "write a positive number"),
    search(
        "a context whose KV cache the device cannot hold", "--context 100000000",
        "does not fit the device", "KV cache for 100000000 tokens", "--context",
    ),
    search("a context of no tokens", "--context 0", "--context must be at least 1, got 0"),
    search("a negative context", "--context -4", "--context must be at least 1, got -4"),
    search("a context with a unit", "--context 4k", "--context", "invalid int value: '4k'"),
    search("a context of 5000 digits", ["--context", _LONG], "--context", "invalid int value"),
)  # fmt: skip

NUMBERS: tuple[Case, ...] = (
    search("no trials", "--trials 0", "--trials must be at least 1, got 0"),
    search("a negative number of trials", "--trials -3", "--trials must be at least 1, got -3"),
    search("half a trial", "--trials 1.5", "--trials", "invalid int value: '1.5'"),
    search("trials that are no number", "--trials nan", "--trials", "invalid int value: 'nan'"),
    search("infinitely many trials", "--trials inf", "--trials", "invalid int value: 'inf'"),
    search("an empty number of trials", ["--trials", ""], "--trials", "invalid int value: ''"),
    search("trials and no number after it", ["--trials"], "--trials", "expected one argument"),
    search("a negative number of workers", "--workers -1", "--workers must be at least 0, got -1"),
    search("workers in words", "--workers two", "--workers", "invalid int value: 'two'"),
    search("more workers than any cluster has", "--workers 1000000", "--workers must be at most"),
    search("a task limit of zero", "--limit 0", "--limit must be at least 1, got 0"),
    search("a negative task limit", "--limit -5", "--limit must be at least 1, got -5"),
    search("a task limit in percent", "--limit 10%", "--limit", "invalid int value: '10%'"),
    search("a negative seed", "--seed -1", "--seed must be within 0..4294967295, got -1"),
    search("a seed of 33 bits", "--seed 4294967296", "--seed must be within 0..4294967295, got 4294967296"),
    search("a seed in hexadecimal", "--seed 0xff", "--seed", "invalid int value: '0xff'"),
    search("a seed of 5000 digits", ["--seed", _LONG], "--seed", "invalid int value"),
)

NAMES: tuple[Case, ...] = (
    search("an unknown device", "--device toaster", "unknown --device 'toaster'", "dgx-spark"),
    search("a misspelt device", "--device dgx-sparc", "unknown --device", "did you mean 'dgx-spark'?"),
    search("an empty device", ["--device", ""], "unknown --device ''"),
    search("an unknown runtime", "--runtime vllm", "unknown --runtime 'vllm'", "known: any, llama.cpp"),
    search("an empty runtime", ["--runtime", ""], "unknown --runtime ''"),
    search("an unknown sampler", "--sampler cmaes", "unknown --sampler 'cmaes'", "tpe"),
    search("a sampler in capitals", "--sampler TPE", "unknown --sampler 'TPE'"),
    search("an unknown way of streaming", "--stream maybe", "--stream", "invalid choice: 'maybe'"),
    search("an unknown way of repairing", "--repair always", "--repair", "invalid choice: 'always'"),
    search("an unknown type", "--types Q4_K,Q9_X", "unknown --types 'Q9_X'", "Q4_K"),
    search("a type that is not searched", "--types F32", "unknown --types 'F32'"),
    search("a type in small letters", "--types q4_k", "unknown --types 'q4_k'"),
    search("types that are only commas", "--types ,,", "--types ',,' names no type"),
    search(
        "types that the budget is too small for", "--types BF16",
        "--budget 3.00 MB is below the smallest possible config", "raise --budget",
    ),
    search("a study's name with a blank", ["--study", "my study"], "--study 'my study'", "letters, digits"),
    search("an empty study's name", ["--study", ""], "--study ''", "letters, digits"),
    search("a study's name that leads out of runs", "--study ../other", "--study '../other'"),
    search("a study's name that is hidden", "--study .new", "--study '.new'", "the first a letter or digit"),
    search("a study's name of 101 letters", ["--study", "n" * 101], "--study", "100 at most"),
    search("a study's name in Cyrillic", "--study исследование", "--study 'исследование'"),
    search("a study's name that ends in a newline", ["--study", "new\n"], "--study 'new\\n'"),
    search("an unknown option", "--bugdet 3MB", "unrecognized arguments: --bugdet 3MB", "--help"),
    search("an option that could be several", "--t x", "ambiguous option: --t could match"),
    search("a flag with a value", "--dry-run=yes", "--dry-run", "ignored explicit argument 'yes'"),
    search("an argument without an option", "more", "unrecognized arguments: more"),
)  # fmt: skip

CASES = (*SIZES, *NUMBERS, *NAMES)
