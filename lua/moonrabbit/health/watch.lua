--- The task that looks after a session with the option `health`: it asks the broker and judges its silence.
--
-- The probe is basic.qos on a channel of its own (opening that channel is the first probe): every AMQP broker
-- answers it, no permission is needed, no queue and no cluster-wide store is touched.
-- @module moonrabbit.health.watch

local health = require "moonrabbit.health"
local Calls = require "moonrabbit.session.calls"

local huge = math.huge

-- So long a suspicion waits for what may lie in the socket.
local SECOND_LOOK = 0.01

-- ---- The probe: what the session takes for a channel's owner --------------------------------------------------

local Probe = {}
Probe.__index = Probe

function Probe:_ended(err)
  self.ended = err
  self.calls:fail(err)
end

Probe._closed_by_broker = Probe._ended

function Probe._flow() end

-- Sends the next one: what is to be waited for, or nil when there is no channel for it.
function Probe:send()
  local session = self.session
  if self.core then
    local ok = not self.ended and self.core:call("basic.qos", { prefetch_count = 1 })
    return ok and session:expect(self.calls, "basic.qos") or nil
  end
  local core = not self.ended and session.engine:open_channel(self)
  if not core then return nil end
  self.core = core
  return session:expect(self.calls, "channel.open")
end

-- ---- The task -------------------------------------------------------------------------------------------------

-- A blocked broker reads nothing, and what is still to be written would keep the question from leaving.
local function may_ask(session)
  return not session.blocked and not session.corked and not session.write_error and session.engine:pending() == 0
end

local function ask(self, now)
  local call = self.probe:send()
  if not call then
    if not self.probe.told then
      self.probe.told = true
      self.session.log("debug", "health: no channel for probes: " .. tostring(self.probe.ended or "all are open"))
    end
    return
  end
  -- Its answer wakes the task where it waits.
  call.condition = self.woken
  self.call, self.sent_at = call, now
  self.detector:probe_sent(now)
end

local function look(self, now)
  local detector, call = self.detector, self.call
  if call and call.done then
    self.call = nil
    if call.ok then detector:probed(call.at, call.at - self.sent_at) end
  end
  local suspicion = detector:check(now)
  if suspicion then
    self.session.runtime.sleep(SECOND_LOOK)
    return detector:check(self.session.runtime.now())
  end
  if not self.call and detector:wants_probe(now) and may_ask(self.session) then ask(self, now) end
end

local function watch(self)
  local session = self.session
  local clock = session.runtime.now
  while session.state == "open" do
    local now = clock()
    local suspicion = look(self, now)
    if session.state ~= "open" then return end
    if suspicion then return session:suspect(suspicion) end
    now = clock()
    local left = self.detector:next_check(now) - now
    session.ended:wait(left < huge and left or nil)
  end
end

local M = {}

--- Starts watching an open session.
---@param session moonrabbit.Session
---@param opts moonrabbit.HealthOptions
function M.start(session, opts)
  local detector = health.new(opts, session.heartbeat, session.runtime.now())
  session.detector = detector
  local calls = Calls.new()
  local probe = setmetatable({ session = session, calls = calls, _calls = calls }, Probe)
  local self = { session = session, detector = detector, probe = probe }
  self.woken = {
    signal = function()
      if self.call then self.call.at = session.runtime.now() end
      session.ended:broadcast()
    end,
  }
  session:start(function() watch(self) end)
end

return M
