"""The table of methods: one entry per name with its terms, weights, knobs, source and known failure.

New method: write the function, add an entry here, add its four tests (by hand, limit, first step, padding).
"""

from __future__ import annotations

from collections.abc import Mapping

from llm_unlearn.methods import distill, hidden, losses, tokenwise
from llm_unlearn.methods.spec import Knob, Method
from llm_unlearn.methods.table_images import FROM_IMAGES, UNBOUNDED

__all__ = ["METHODS"]

BETA = Knob(default=0.1, search=(0.05, 0.1, 0.5), help="inverse temperature, per nat")
FLAT_NOTE = (
    "No retain term, as in the paper. P is the mean probability of an answer's own tokens, as the paper has it; "
    "the authors' code divides by the padded width."
)

# gamma, alpha and hyper-parameters are OpenUnlearning's (the values of its YAML files), except where the note says so.
METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="finetune",
            forget=None,
            retain="nll",
            gamma=0.0,
            mean_over="token",
            formula="-mean_N logp(retain)",
            source="arXiv:2512.03437, as a baseline",
            failure="Forgets next to nothing within a budget: the retain set does not contradict what was memorised.",
        ),
        Method(
            name="ga",
            forget=losses.ga,
            retain="none",
            mean_over="token",
            formula="mean_N logp(forget)",
            source="arXiv:2210.01504; arXiv:2401.06121",
            failure=UNBOUNDED,
        ),
        Method(
            name="graddiff",
            forget=losses.ga,
            retain="nll",
            alpha_search=(1.0, 2.0, 5.0),
            mean_over="token",
            formula="mean_N logp(forget) - mean_N logp(retain)",
            source="arXiv:2203.12817; arXiv:2401.06121",
            failure=UNBOUNDED,
        ),
        Method(
            name="kl",
            forget=losses.ga,
            retain="kl",
            alpha_search=(1.0, 2.0, 5.0),
            mean_over="token",
            formula="mean_N logp(forget) + mean_N KL(p_ref || p)(retain)",
            source="arXiv:2401.06121",
            failure=UNBOUNDED,
            note="KL on answer tokens only; TOFU's and OpenUnlearning's code count prompt and padding too.",
        ),
        Method(
            name="idk",
            forget=losses.idk,
            retain="nll",
            alpha_search=(1.0, 2.0, 5.0),
            mean_over="token",
            formula="-mean_N logp(refusal) - mean_N logp(retain)",
            source="arXiv:2401.06121",
            note="Called preference optimisation (PO) in TOFU. Weights are the paper's: 1 and 1.",
            failure="Teaches a refusal to one wording; the fact stays readable under others and in the hidden states.",
        ),
        Method(
            name="idk_dpo",
            forget=losses.idk_dpo,
            retain="nll",
            params={"beta": BETA},
            alpha_search=(1.0, 2.0, 5.0),
            mean_over="sequence",
            formula="-(2/beta) mean_B log sigmoid(beta [log p/p_ref(refusal) - log p/p_ref(forget)])",
            source="arXiv:2305.18290 eq. 7; arXiv:2404.05868 eq. 2",
            note="Factor 2/beta as in the code of NPO's authors and of OpenUnlearning; the papers print 1 and 1/beta.",
            failure="The refusal spreads to retained questions once the margin is large; few updates move little.",
        ),
        Method(
            name="npo",
            forget=losses.npo,
            retain="nll",
            params={"beta": BETA},
            alpha_search=(1.0, 2.0, 5.0),
            mean_over="sequence",
            formula="-(2/beta) mean_B log sigmoid(-beta log p/p_ref(forget))",
            source="arXiv:2404.05868 eq. 3",
            failure="Slows down by itself but drifts on: at a large learning rate the neighbourhood goes too.",
        ),
        Method(
            name="simnpo",
            forget=losses.simnpo,
            retain="nll",
            params={
                "beta": Knob(
                    default=4.5, search=(2.5, 4.5, 5.5), help="inverse temperature, per nat and token of the answer"
                ),
                "delta": Knob(
                    default=0.0, search=(0.0,), closed=True, help="loss in nats per token that the answer must exceed"
                ),
            },
            gamma=0.125,
            alpha_search=(1.0, 2.0, 5.0),
            mean_over="sequence",
            formula="-(2/beta) mean_B log sigmoid(beta (-log p / length - delta))",
            source="arXiv:2410.07163",
            note="The margin of the paper is beta * delta. The paper puts its small weight on the retain term; the "
            "authors' commands and OpenUnlearning put it on the forget term (gamma), as here. For the paper's form set "
            "gamma=1 and alpha=0.125.",
            failure="Stops short where beta is large: the gradient fades while the answer is still the likeliest.",
        ),
        Method(
            name="rmu",
            forget=hidden.rmu,
            retain="embed",
            alpha_search=(1.0, 100.0, 1200.0),
            params={"coeff": Knob(default=2.0, search=(2.0, 6.5, 20.0), help="length of the target")},
            mean_over="sequence",
            formula="mean_B mean_T |h - coeff u|^2 / H",
            source="arXiv:2403.03218, method section",
            note="coeff has to grow with the length of the hidden states: tune it per model. The paper's own runs use "
            "other values (about 6.5 for coeff and 1200 for alpha on Zephyr-7B).",
            failure="Below a layer-dependent coeff nothing is forgotten, above it narrow models lose everything.",
        ),
        # --- weights per token, alternates and whole distributions
        Method(
            name="altpo",
            forget=losses.altpo,
            retain="nll",
            params={"beta": BETA},
            alpha_search=(1.0, 2.0, 5.0),
            mean_over="sequence",
            formula="-(2/beta) mean_B log sigmoid(beta [log p/p_ref(alternate) - log p/p_ref(forget)])",
            source="arXiv:2409.13474; arXiv:2305.18290 eq. 7",
            note="The paper samples k=5 alternates from the start model (method.alternates=generated); on our worlds, "
            "whose small models say nothing but what they memorised, they are other rows' answers (swapped).",
            failure="Teaches k wrong answers: the model then states one of them with confidence.",
        ),
        Method(
            name="undial",
            forget=distill.undial,
            retain="none",
            params={
                "beta": Knob(
                    default=10.0, search=(3.0, 10.0, 30.0), closed=True, help="how far the token's logit is lowered"
                )
            },
            alpha_search=(1.0, 2.0, 5.0),
            mean_over="token",
            formula="mean_N CE(softmax(z_ref - beta onehot(y)), p)(forget)",
            source="arXiv:2402.10052",
            note="Answer tokens only; OpenUnlearning counts prompt and padding too, and lowers entry V-100 there. No "
            "retain term, as OpenUnlearning's default. Holds a copy of the start model (none under LoRA).",
            failure="Lowers the token wherever it stands: without a retain term small models lose what is kept too.",
        ),
        Method(
            name="wga",
            forget=tokenwise.wga,
            retain="nll",
            params={"beta": Knob(default=1.0, search=(0.5, 1.0, 2.0), help="how fast a token's weight fades")},
            alpha_search=(1.0, 2.0, 5.0),
            mean_over="token",
            formula="mean_N [p^beta] log p(forget), [.] without gradient",
            source="arXiv:2502.19301",
            failure="A large beta gives up on a token early, a small one is plain ascent; the loss shows no progress.",
        ),
        Method(
            name="satimp",
            forget=tokenwise.satimp,
            retain="nll",
            params={
                "beta1": Knob(
                    default=5.0, search=(0.3, 1.0, 5.0), closed=True, help="saturation: weight p^beta1 on what is left"
                ),
                "beta2": Knob(
                    default=1.0, search=(0.3, 1.0), closed=True, help="importance: weight (1-p)^beta2 on the uncertain"
                ),
            },
            gamma=0.1,
            alpha_search=(1.0, 2.0, 5.0),
            mean_over="token",
            formula="mean_N [p^beta1 (1-p)^beta2] log p(forget), [.] without gradient",
            source="arXiv:2505.11953, section 5",
            failure="A token of probability 1 gets no gradient: fully memorised answers hardly move.",
        ),
        Method(
            name="me",
            forget=tokenwise.me,
            retain="nll",
            gamma=0.1,
            alpha_search=(1.0, 2.0, 5.0),
            mean_over="token",
            formula="mean_N KL(uniform || p)(forget)",
            source="arXiv:2410.08109",
            note="KL(uniform || p) as in the authors' code; the paper prints KL(p || uniform), with the same minimum. "
            "Answer tokens only; their code counts question and padding too.",
            failure="Uniform over the vocabulary is gibberish: forgotten questions stand out; a large gamma takes "
            "fluency with it.",
        ),
        Method(
            name="ceu",
            forget=tokenwise.ceu,
            retain="none",
            params={
                "skip": Knob(
                    default=1, search=(0, 1), closed=True, whole=True, help="first answer tokens that do not count"
                )
            },
            alpha_search=(1.0, 2.0, 5.0),
            mean_over="token",
            formula="(1/N) sum_{token > skip} CE([softmax(z, z_y=-inf)], p)(forget), [.] without gradient",
            source="arXiv:2503.01224",
            note="No retain term and skip=1 as in the paper; OpenUnlearning divides by the tokens not skipped. Answers "
            "of one token need skip=0.",
            failure="Nothing speaks for retained answers: words they share with forgotten ones go too.",
        ),
        Method(
            name="flat",
            forget=tokenwise.flat,
            retain="none",
            alpha_search=(1.0, 2.0, 5.0),
            mean_over="sequence",
            formula="mean_B [tanh P(forget) - tanh P(refusal)] / 2, P = mean_T p",
            source="arXiv:2410.11143 (total variation)",
            note=FLAT_NOTE,
            failure="The refusal spreads to retained questions: nothing in the loss speaks for them.",
        ),
        Method(
            name="flat_kl",
            forget=tokenwise.flat_kl,
            retain="none",
            alpha_search=(1.0, 2.0, 5.0),
            mean_over="sequence",
            formula="mean_B [exp(P(forget) - 1) - P(refusal)], P = mean_T p",
            source="arXiv:2410.11143 (Kullback-Leibler)",
            note=FLAT_NOTE,
            failure="As flat, and faster: the refusal's weight does not fade.",
        ),
        Method(
            name="rmu_adaptive",
            forget=hidden.rmu_adaptive,
            retain="embed",
            alpha_search=(1.0, 100.0, 1200.0),
            params={
                "scale": Knob(
                    default=5.0, search=(2.0, 3.0, 5.0, 10.0), help="length of the target, in the start model's lengths"
                )
            },
            mean_over="sequence",
            formula="mean_B mean_T |h - scale |h_ref| u|^2 / H",
            source="arXiv:2408.06223",
            note="Each token's own length, as in the paper; the authors' code takes the mean over the first batch.",
            failure="As rmu; a scale that undoes a late layer undoes the retained answers read from it as well.",
        ),
        # --- distillation, constraints and gradients rewritten
        Method(
            name="scrub",
            forget=distill.scrub,
            retain="distil",
            step_params={
                "msteps": Knob(
                    default=3.0, search=(1.0, 3.0, 10.0), help="passes over the forget set in updates that forget"
                )
            },
            rule="turns",
            mean_over="token",
            formula="-mean_N KL(p_ref || p)(forget), then kl_weight KL(p_ref || p) - nll_weight logp (retain)",
            source="arXiv:2302.09880, section 3",
            note="The paper turns by epochs: one over the forget set, one over the retain set, msteps times, then only "
            "the latter. Here the turns are single updates, forget first as there, though the first has no gradient "
            "at the start model. After msteps passes over the forget set every update is of the retain term. "
            "No temperature. Nor is there a rewind of its own (SCRUB+R): the paper trains to the end and goes back to "
            "the checkpoint whose forget error is nearest to that of the final model on held-out data like the forget "
            "set. Here, as for every method, the run stops at the forget probability of gold, or of the start on what "
            "it never saw (stop.until=target), and keeps the evaluated step at that level that kept most "
            "(stop.keep=best); stop.until=max_steps goes to the end first, as the paper does.",
            failure=UNBOUNDED + " With few msteps the updates that repair bring the answers back.",
        ),
        Method(
            name="pdu",
            forget=distill.pdu,
            retain="nll",
            step_params={
                "eta": Knob(default=1.0, search=(1.0, 5.0), closed=True, help="step of the dual ascent; 0 keeps alpha"),
                "eps": Knob(
                    default=0.0,
                    search=(0.0,),
                    closed=True,
                    help="limit of the retain loss; 0: start model's plus slack",
                ),
                "slack": Knob(
                    default=0.1,
                    search=(0.05, 0.1, 0.3),
                    closed=True,
                    help="how far above the start model's it may rise",
                ),
                "warmup": Knob(
                    default=5.0, search=(0.0, 5.0), closed=True, help="passes over the forget set before alpha moves"
                ),
            },
            rule="dual",
            alpha=50.0,
            alpha_search=(50.0, 100.0),
            mean_over="token",
            formula="mean_N (max z - mean z)^2 (forget), subject to mean_N -logp(retain) <= eps",
            source="arXiv:2506.05314",
            note="alpha is where the dual begins: alpha <- max(0, alpha + eta (retain loss - eps)) after every update, "
            "as in the authors' code (50 to 100, eta 1 to 5, warm-up of 3 to 5 passes); eps is given there, a little "
            "above the start model's.",
            failure="A squared margin of logits is large: below a weight of about 50 the retain set goes first. With "
            "eps above what forgetting costs the constraint never binds and the dual falls to 0.",
        ),
        Method(
            name="whp",
            forget=distill.whp,
            retain="none",
            step_params={
                "strength": Knob(
                    default=5.0, search=(1.0, 5.0, 20.0), closed=True, help="how far reinforced tokens are pushed down"
                ),
                "reinforce_updates": Knob(
                    default=60.0,
                    search=(20.0, 60.0, 200.0),
                    low=1.0,
                    closed=True,
                    whole=True,
                    help="updates of the reinforced model",
                ),
                "reinforce_lr": Knob(
                    default=1e-4, search=(1e-5, 1e-4, 1e-3), help="learning rate of the reinforced model"
                ),
            },
            alpha_search=(1.0, 2.0, 5.0),
            mean_over="token",
            formula="-mean_N log p(argmax(v_b - strength ReLU(v_r - v_b)))(forget)",
            source="arXiv:2310.02238, section 2",
            note="Targets are made once: a copy of the start model is fine-tuned on the forget set, read, and dropped. "
            "The paper's replacement of anchored terms has no meaning for question and answer and is left out; its "
            "reinforced model is trained for 3 epochs at 3e-6. There is no retain term in the paper.",
            failure="Without a retain term a small model loses the rest with it: set retain=nll. Where reinforcement "
            "raises the answers by less than their margin the targets stay the answers (generic_changed in run.json).",
        ),
        Method(
            name="npo_sam",
            forget=losses.npo,
            retain="nll",
            params={"beta": BETA},
            gradient="sam",
            alpha_search=(1.0, 2.0, 5.0),
            mean_over="sequence",
            formula="max_{|e| <= rho} npo(theta + e) - mean_N logp(retain)",
            source="arXiv:2502.05374; arXiv:2404.05868 eq. 3",
            note="rho is among method.gradient_params.",
            failure="As npo; flatter minima come at one more pass over the forget batch an update.",
        ),
        *FROM_IMAGES,
    )
}
