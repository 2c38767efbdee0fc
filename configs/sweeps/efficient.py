"""Claim: none of a paper; configs/efficient.py takes fewer reward queries than DDPO; what each of its parts is worth.

Source: DDPO as in Black et al. 2023, all steps trained. Show: gains on equal prompts and noise against reward queries
and against calls of the denoiser, on four rewards, with LOOP's advantages as well; on two with one part made as DDPO
has it, and with the weighting that gains most in weighting_schemes.
"""

BASELINE = "ddpo"
SEEDS = 5
DIFFERENCE = 0.5
REWARDS = {
    "jpeg_compressibility": "",
    "aesthetic": "",
    "jpeg_incompressibility": "",
    "mini_verifier": ",prompts.category=color,prompts.count=8",
}
PARTS = {
    "early_weighting": {"config": ",weighting=gaussian_early"},
    "uniform_weighting": {"config": ",weighting=uniform"},
    "three_of_ten_steps": {"train.timestep_fraction": 0.3},
    "epochs_of_20": {"sample.batch_size": 20, "num_epochs": 20, "log.evaluate_every": 2, "checkpoint.every": 2},
}


def runs():
    found = []
    for reward, prompts in REWARDS.items():
        choices = f"model=mini,reward={reward}"
        ddpo = f"../papers/ddpo.py:{choices},train.timestep_fraction=1.0{prompts}"
        found.append({"panel": reward, "name": "ddpo", "config": ddpo})
        parts = PARTS if reward in ("jpeg_compressibility", "aesthetic") else {}
        longer = {"num_epochs": 512} if reward == "mini_verifier" else {}  # 400 queries are too few there
        for name, other in ({"efficient": {}, "loop_advantages": {"config": ",algorithm=loop"}} | parts).items():
            config = f"../efficient.py:{choices}{prompts}" + other.get("config", "")
            found.append({"panel": reward, "name": name} | longer | other | {"config": config})
    return found
