"""Entries of the table of methods from the literature on images, edits and masks among them; for texts as well."""

from __future__ import annotations

from llm_unlearn.methods import distill, edits, losses, weights
from llm_unlearn.methods.spec import Knob, Method, Weights

__all__ = ["FROM_IMAGES", "UNBOUNDED"]

UNBOUNDED = (
    "Unbounded below: the loss falls for ever and takes the model with it. Use a small learning rate and a stop."
)

FROM_IMAGES: tuple[Method, ...] = (
    Method(
        name="neggrad_plus",
        forget=losses.ga,
        retain="nll",
        weights=Weights(
            fn=weights.mixture,
            params={
                "beta": Knob(
                    default=0.95,
                    search=(0.9, 0.95, 0.99, 0.999),
                    high=1.0,
                    closed=True,
                    help="share of the retain term; the forget term has the rest",
                )
            },
            formula="gamma = 1 - beta, alpha = beta",
        ),
        mean_over="token",
        formula="mean_N logp(forget)",
        source="arXiv:2302.09880, NegGrad+",
        note="graddiff with one knob for both weights. Called beta in the paper and alpha in the authors' code; "
        "0.95 is said to be their value for small data, 0.9999 for large.",
        failure=UNBOUNDED + " Near 1 it is fine-tuning and forgets nothing.",
    ),
    Method(
        name="nabla_tau",
        forget=losses.nabla_tau,
        retain="nll",
        params={
            "target": Knob(
                default=0.0,
                search=(0.0,),
                closed=True,
                help="loss to rise to, nats per token; 0: the mean loss on data never trained on",
            )
        },
        weights=Weights(
            fn=weights.decaying_mixture,
            params={
                "start": Knob(
                    default=0.5,
                    search=(0.05, 0.15, 0.5),
                    high=1.0,
                    closed=True,
                    help="weight of the forget term at the first update",
                )
            },
            formula="gamma = start (1 - t/T), alpha = 1 - gamma, at update t of T",
        ),
        mean_over="token",
        formula="ReLU(target + mean_N logp(forget))^2",
        source="arXiv:2403.14339; weights and schedule as in the authors' code",
        note="The paper itself could not be read: equation and schedule are those of the authors' notebooks. They "
        "measure the target on validation data every five epochs, under the model as it then is. Here it is "
        "measured once, before the first update: the start model's loss on what it never saw (split holdout, of "
        "validation images where there are any), "
        "without that split gold's on the forget set; without either it has to be given. "
        "Their start is 0.5 for text, and for images 5/3 of the forget set's share of the training set. Where a "
        "step is divided into micro-batches, the mean of the whole batch takes one more forward pass over it.",
        failure="The mean reaches the target while some items are far above it and others memorised still. With "
        "a target near the start's loss it does nothing.",
    ),
    Method(
        name="l1_sparse",
        forget=losses.l1,
        retain="nll",
        weights=Weights(
            fn=weights.decaying,
            params={
                "strength": Knob(
                    default=5e-4,
                    search=(1e-5, 1e-4, 5e-4, 1e-3),
                    closed=True,
                    help="weight of the penalty at the first update",
                )
            },
            formula="gamma = strength (1 - t/T), alpha = 1, at update t of T",
        ),
        mean_over="token",
        formula="sum |theta|, over the trained weights",
        source="arXiv:2304.04934, sparsity-aware unlearning; schedule as in the authors' code",
        note="Never reads the forget set. In the loss, not through the optimizer's weight decay. The penalty is "
        "lowered after every update, in the authors' code after every epoch. Under LoRA the adapters are what "
        "is penalised, which takes the training back instead of making the model sparse.",
        failure="Forgets what the retain set does not need, whatever was asked for; the strength that does so "
        "grows with the model, and one too large takes everything.",
    ),
    Method(
        name="bad_teacher",
        forget=distill.bad_teacher,
        retain="kl",
        alpha_search=(1.0, 2.0, 5.0),
        mean_over="token",
        formula="mean_N KL(p_untrained || p)(forget)",
        source="arXiv:2205.08096",
        note="The paper itself could not be read: direction and temperature are those of the authors' code, which "
        "mixes all forget samples and a share of the retain ones in one batch. Here both terms have a batch of "
        "their own, weighed by gamma and alpha. The untrained model is made of the start model's config with a "
        "seed derived from the run's, and held whole, under LoRA too.",
        failure="Guesses at random where a model that never saw the item would guess well, which gives it away. "
        "Where the architecture's initialisation has large weights the untrained model is sure of its guesses.",
    ),
    Method(
        name="random_label",
        forget=losses.random_label,
        retain="nll",
        alpha_search=(1.0, 2.0, 5.0),
        mean_over="token",
        formula="-mean_N logp(random answer)",
        source="arXiv:1911.04933, a baseline there; arXiv:2310.12508 without its mask",
        note="The answers are drawn as for salun.",
        failure="Teaches wrong answers, held as firmly as the right one was.",
    ),
    # --- edits and masks
    Method(
        name="salun",
        forget=losses.random_label,
        retain="nll",
        mask="saliency",
        alpha_search=(1.0, 2.0, 5.0),
        formula="-mean_N logp(random answer), on the weights of the mask",
        source="arXiv:2310.12508, method section",
        note="The random answer to a forget question is that of another training question of the same relation and "
        "wording (of any question, where the data names none) whose text differs; drawn with the seed, anew at "
        "every pass over the forget set for eight passes, then again from the first. The row's perturbed answers "
        "are not used: truth ratio is measured on them.",
        failure="Teaches wrong answers, held as firmly as the right one was; the trained weights serve the retain "
        "set too.",
    ),
    Method(
        name="task_vector",
        kind="edit",
        edit=edits.task_vector,
        retain="none",
        params={
            "lam": Knob(
                default=1.0,
                search=(0.5, 1.0, 2.0, 5.0),
                closed=True,
                help="scale of the difference",
            )
        },
        formula="theta - lam (theta_reinforced - theta)",
        source="arXiv:2212.04089; arXiv:2407.06460",
        note="Reinforced: the start model trained on the forget set with the run's optimizer for loop.max_steps "
        "updates, or method.reinforced. The paper takes lam from 0 to 1 by validation, MUSE 1.",
        failure="A set that is memorised already gives no direction: the difference is noise and weight decay.",
    ),
    Method(
        name="fisher",
        kind="edit",
        edit=edits.fisher,
        retain="none",
        params={
            "alpha": Knob(
                default=1e-3,
                search=(1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2),
                closed=True,
                help="scale of the noise, (lambda sigma^2)^(1/4)",
            ),
            "floor": Knob(default=1e-8, search=(1e-8, 1e-6, 1e-4), help="added to the Fisher information"),
        },
        formula="theta + alpha (F_retain + floor)^(-1/4) n, n ~ N(0, 1)",
        source="arXiv:1911.04933, Fisher forgetting",
        note="Empirical Fisher (observed answers, one gradient per item), diagonal. The authors' code has the "
        "power -1/2, clamps the noise and takes an expectation over the model's own labels, which ten classes would "
        "allow here too and a vocabulary would not.",
        failure="Forgets by damage: noise large enough to reach the forget set reaches the retain set as well.",
    ),
    Method(
        name="ssd",
        kind="edit",
        edit=edits.ssd,
        retain="none",
        params={
            "alpha": Knob(
                default=10.0,
                search=(1.5, 2.0, 3.0, 5.0, 8.0, 10.0, 50.0),
                help="selects where I_forget > alpha * I_all",
            ),
            "lam": Knob(default=1.0, search=(0.1, 0.5, 1.0), closed=True, help="dampening, times I_all / I_forget"),
        },
        formula="theta min(lam I_all / I_forget, 1) where I_forget > alpha I_all",
        source="arXiv:2308.07707, method section",
        note="I: mean over items of the squared gradient, one gradient per item; the authors' code squares "
        "gradients of batches.",
        failure="An alpha at or above (all items / forget items), 10 where a tenth is forgotten, selects nothing; "
        "a low one takes shared weights.",
    ),
)
