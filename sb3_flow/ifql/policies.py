from sb3_flow.offline.policies import BestOfSamplesPolicy, ValueNetwork, WithDict, WithImages


class IFQLPolicy(BestOfSamplesPolicy):
    """
    Policy class of IFQL: the ``bc_flow``, the ``critic`` and its target, and the ``value``. It acts by the best of several
    samples of the flow, that whose least value among the critics is the largest. Its parameters are those of
    :class:`~sb3_flow.offline.policies.BestOfSamplesPolicy`.
    """

    network_names = ("bc_flow", "critic", "critic_target", "value")
    q_agg = "min"
    value: ValueNetwork


class IFQLCnnPolicy(WithImages, IFQLPolicy):
    """
    Policy class of IFQL for image observations: :class:`.IFQLPolicy` with a small IMPALA encoder as the default features
    extractor.
    """


class IFQLMultiInputPolicy(WithDict, IFQLPolicy):
    """
    Policy class of IFQL for ``Dict`` observations: :class:`.IFQLPolicy` with a ``CombinedExtractor`` as the default features
    extractor.
    """


MlpPolicy = IFQLPolicy
CnnPolicy = IFQLCnnPolicy
MultiInputPolicy = IFQLMultiInputPolicy
