--- When a publisher leaves its channel for another one: the broker refuses again and again what is sent on it.
--
-- RabbitMQ (seen on 3.10) remembers for each channel where a quorum queue's leader is. A channel whose first publish
-- meets the moment in which the leader's node is gone refuses everything for that queue until the node is back, while
-- every other channel is served. A full queue refuses on every channel: there another one changes nothing, so channels
-- are left ever more seldom.
--
-- What is under way on a channel that is left has no outcome, and would go out twice. So from `begin` to `over` nothing
-- is sent, until the broker has settled it all; where it does not do so in time, the channel stays for now. Only a message
-- that has been refused so often that it is about to be given up, and never had another channel, is worth that, once in a
-- while.
-- @module moonrabbit.publisher.renewal

local max, min, huge = math.max, math.min, math.huge

-- A message that was refused so often has given the cluster time to choose another leader.
local REFUSALS = 3
-- One that was refused so often, or the last time that it may be, is about to be given up.
local LAST_REFUSALS = 8
-- Seconds between two channels that are left with something under way: each twice the one before, to an hour.
local FIRST_COPIES, MOST_COPIES = 60, 3600
-- Seconds between two renewals: the first, each twice the one before, and after so long without one the first again.
local FIRST, MOST, QUIET = 0.5, 60, 120
-- Seconds in which the broker settles what is under way: a full window takes it about three.
local PATIENCE = 5

---@class moonrabbit.publisher.Renewal
---@field by number?   nothing is sent, until this time at most; nil: the channel is not to be left
local Renewal = {}
Renewal.__index = Renewal

function Renewal.new()
  return setmetatable({ at = -huge, pause = FIRST, copies_at = -huge, copies_pause = FIRST_COPIES }, Renewal)
end

--- Whether this message, whose time has come, should rather go by another channel.
---@param record table   of the publisher's ring
---@param now number
---@return boolean
function Renewal:helps(record, now)
  return record.outcome == "nacked" and record.attempts >= REFUSALS and now >= self.at
end

--- Whether this message, whose time has come, is worth that what is under way goes out twice.
---@param record table   of the publisher's ring
---@param attempts number   how often it may be refused
---@param now number
---@return boolean
function Renewal:insists(record, attempts, now)
  return record.outcome == "nacked" and not record.moved and now >= self.copies_at
    and record.attempts >= max(REFUSALS, min(LAST_REFUSALS, attempts))
end

--- The channel is left with something under way.
---@param now number
function Renewal:copied(now)
  self.copies_at = now + self.copies_pause
  self.copies_pause = min(MOST_COPIES, 2 * self.copies_pause)
end

--- The channel is to be left, as soon as nothing is under way on it.
---@param why moonrabbit.Error
---@param now number
function Renewal:begin(why, now)
  self.by, self._why = now + PATIENCE, why
end

--- The channel is left, or stays for now: why it was to be left.
---@param now number
---@return moonrabbit.Error
function Renewal:over(now)
  if now - self.at > QUIET then self.pause = FIRST end
  self.at = now + self.pause
  self.pause = min(MOST, 2 * self.pause)
  self.by = nil
  return self._why
end

--- The channel is gone by itself.
function Renewal:forget() self.by = nil end

return Renewal
