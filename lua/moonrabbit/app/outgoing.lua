--- The channels that an app publishes on: one for each purpose, opened when it is needed, and again when it is gone.
--
-- One on which the broker refuses (basic.nack) again and again is left for another one: RabbitMQ 3.10 may refuse
-- everything on a channel whose first publish met a quorum queue without a leader (moonrabbit.publisher.renewal). A full
-- queue refuses on every channel; so channels are left ever more seldom.
-- @module moonrabbit.app.outgoing

local errors = require "moonrabbit.errors"
local Renewal = require "moonrabbit.publisher.renewal"

-- Seconds for which a channel that was left waits for the outcome of what is under way on it.
local PATIENCE = 30
-- Seconds after which a refusal says nothing of its channel any more. (What is confirmed meanwhile says nothing either:
-- it may have gone to another queue.)
local FORGOTTEN = 600

---@class moonrabbit.app.Outgoing
local Outgoing = {}
Outgoing.__index = Outgoing

---@param runtime table
---@param connection moonrabbit.Connection
function Outgoing.new(runtime, connection)
  return setmetatable({
    runtime = runtime, connection = connection, channels = {}, renewals = {}, closed = false,
    refusals = {}, refused_at = {}, -- of the present channels: how many, and when last
  }, Outgoing)
end

--- What there is instead of a channel before an app runs, and after.
---@return moonrabbit.Error
function Outgoing.over()
  return errors.new { kind = "closed", message = "the app is not running", temporary = false }
end

--- The channel for a purpose.
---@param purpose string
---@return moonrabbit.Channel|nil, moonrabbit.Error?
function Outgoing:channel(purpose)
  local channel = self.channels[purpose]
  if channel and channel:is_open() then return channel end
  if self.closed then return nil, Outgoing.over() end
  local opened, err = self.connection:channel { confirm = true }
  if not opened then return nil, err end
  if self.closed then -- meanwhile
    opened:close()
    return nil, Outgoing.over()
  end
  channel = self.channels[purpose]
  if channel and channel:is_open() then -- another task was faster
    opened:close()
    return channel
  end
  self.channels[purpose], self.refusals[purpose] = opened, 0
  return opened
end

local function retire(channel)
  channel:wait_for_confirms(PATIENCE)
  if channel:is_open() then channel:close() end
end

--- How a publish on a channel ended; one that is refused too often is left.
---@param purpose string
---@param channel moonrabbit.Channel
---@param ok true?
---@param err moonrabbit.Error?
function Outgoing:heard(purpose, channel, ok, err)
  if ok or not err or err.kind ~= "nacked" or self.channels[purpose] ~= channel then return end
  local time = self.runtime.now()
  local recent = time - (self.refused_at[purpose] or time) <= FORGOTTEN
  local refusals = (recent and self.refusals[purpose] or 0) + 1
  local renewal = self.renewals[purpose] or Renewal.new()
  self.refusals[purpose], self.refused_at[purpose], self.renewals[purpose] = refusals, time, renewal
  if not renewal:helps({ outcome = "nacked", attempts = refusals }, time) then return end
  renewal:over(time)
  self.channels[purpose] = nil
  self.runtime.spawn(retire, channel)
end

--- Closes them all, for good.
function Outgoing:close(timeout)
  self.closed = true
  for _, channel in pairs(self.channels) do
    if channel:is_open() then channel:close(timeout) end
  end
  self.channels = {}
end

return Outgoing
