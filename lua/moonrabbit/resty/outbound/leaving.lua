--- The end of what a worker publishes: it stays for its confirms, and not for ever.
-- @module moonrabbit.resty.outbound.leaving

local jobs = require "moonrabbit.resty.outbound.jobs"
local life = require "moonrabbit.resty.life"
local queue = require "moonrabbit.resty.outbound.queue"
local runtime = require "moonrabbit.runtime.resty"

local now = runtime.now

local leaving = {}

-- After so long without work a worker that leaves closes its connection.
local GRACE = 0.25

--- Whether the session is to end: the worker leaves, and nothing is left to do or no time to do it.
function leaving.is_over(self, keeper)
  if not life.exiting then return false end
  if keeper:overdue() then return true end
  if self:busy() then
    self.idle_since = nil
    return false
  end
  self.idle_since = self.idle_since or now()
  return now() - self.idle_since >= GRACE
end

--- How long the sender may sleep meanwhile.
function leaving.patience(keeper) return math.max(0.001, math.min(GRACE, keeper.leave_by - now())) end

--- The worker cannot stay any longer.
function leaving.abandon(self)
  local err = self:error("shutdown", "the worker has left before the broker confirmed the message", true)
  local n = 0
  for index = self.head, self.tail - 1 do
    if self.kept[index % self.slots + 1] then
      n = n + 1
      queue.finish(self, index, nil, err)
    end
  end
  if n > 0 then
    runtime.log("error", ("%s: %d messages were not confirmed when the worker had to leave"):format(
      self.config.name, n))
  end
  jobs.fail(self, err)
end

return leaving
