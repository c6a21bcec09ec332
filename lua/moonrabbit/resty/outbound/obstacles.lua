--- What keeps the messages of a worker from being sent now, as errors for those who wait.
-- @module moonrabbit.resty.outbound.obstacles

local obstacles = {}

--- What kept the connection away, for an error.
function obstacles.away(self, timeout)
  local failure = self.keeper.state ~= "open" and self.keeper.failure
  if not failure then return nil end
  return self:error(failure.kind, ("there was no connection to the broker for %g s: %s"):format(timeout,
    failure.message), failure.temporary)
end

--- An error while publishing is held: the standby of two sites is consume-only until it is released.
function obstacles.held(self)
  local channel = self.channel
  local why = self.keeper.state == "open" and channel and channel:is_open() and channel._session.held
  return why and self:error("blocked", why, true) or nil
end

--- An error while the broker has blocked publishing.
function obstacles.blocked(self, timeout)
  local channel = self.channel
  local why = self.keeper.state == "open" and channel and channel._session.blocked
  return why and self:error("blocked", ("the message was not sent within %g s: the broker has blocked publishing (%s)")
    :format(timeout, why), true) or nil
end

--- The broker refuses us for good: waiting would not help.
function obstacles.refused(self)
  local failure = self.keeper.state ~= "open" and self.keeper.failure
  if failure and failure.temporary == false then return failure end
end

return obstacles
