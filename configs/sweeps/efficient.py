"""Claim: none of a paper; configs/efficient.py takes fewer reward queries than DDPO; what each of its parts is worth.

Source: DDPO as in Black et al. 2023, all steps trained. Show: gains on equal prompts and noise against reward queries
and against calls of the denoiser, on four rewards; on two of them with one part left out or made as DDPO has it.
"""

BASELINE = "ddpo"
SEEDS = 5
REWARDS = {
    "jpeg_compressibility": "",
    "aesthetic": "",
    "jpeg_incompressibility": "",
    "mini_verifier": ",prompts.category=color,prompts.count=8",
}
PARTS = {
    "uniform_weighting": {"config": ",weighting=uniform"},
    "ddpo_advantages": {"config": ",algorithm=ddpo"},
    "three_of_ten_steps": {"train.timestep_fraction": 0.3},
    "epochs_of_20": {"sample.batch_size": 20, "num_epochs": 20, "log.evaluate_every": 2, "checkpoint.every": 2},
}


def runs():
    found = []
    for reward, prompts in REWARDS.items():
        choices = f"model=mini,reward={reward}"
        ddpo = f"../papers/ddpo.py:{choices},train.timestep_fraction=1.0{prompts}"
        efficient = f"../efficient.py:{choices}"
        found.append({"panel": reward, "name": "ddpo", "config": ddpo})
        longer = {"num_epochs": 340} if reward == "mini_verifier" else {}  # it takes more than 400 queries
        found.append({"panel": reward, "name": "efficient", "config": efficient + prompts} | longer)
        if not prompts and reward != "jpeg_incompressibility":
            for name, other in PARTS.items():
                config = efficient + other.get("config", "")
                found.append({"panel": reward, "name": name} | other | {"config": config})
    return found
