"""Weight sync: copies new versions of the policy's weights into rollout engines and checks them by digests."""
