--- A session of the connection that publishes: from a channel to the next, until it is lost or the worker leaves.
--
-- What was sent and not settled when a channel ends is sent again on the next one, from `head` on, in its order.
--
-- A message that makes the broker close the channel or the connection (an unknown exchange, a forbidden one)
-- would do so again with whatever shared the channel with it. So after such an end those that were
-- under way go one at a time; the one that the broker closes upon has failed, and the others pass.
-- @module moonrabbit.resty.outbound.session

local jobs = require "moonrabbit.resty.outbound.jobs"
local leaving = require "moonrabbit.resty.outbound.leaving"
local life = require "moonrabbit.resty.life"
local obstacles = require "moonrabbit.resty.outbound.obstacles"
local queue = require "moonrabbit.resty.outbound.queue"
local runtime = require "moonrabbit.runtime.resty"
local send_all = require "moonrabbit.resty.outbound.send"
local settling = require "moonrabbit.resty.outbound.settle"

local huge = math.huge
local crowded, finish = queue.crowded, queue.finish
local settle, noticed = settling.settle, settling.noticed
local LONG = require("moonrabbit.runtime.resty.limits").LONG

local session = {}

-- So often all are looked at, when confirms come out of order.
local SWEEP = 0.005

-- Waits to be woken, by any message.
local function sleep(self, limit)
  self.sleeping = "any"
  self.wake:wait(limit)
  self.sleeping = nil
end

-- Waits for something to do. Messages that nobody waits for may gather for `linger` seconds.
local function rest(self, channel, limit)
  if #self.jobs > 0 or not channel:is_open() then return end
  sleep(self, limit)
  local linger = self.config.linger
  if linger == 0 or self.urgent or self.sweep_due or #self.jobs > 0 or life.exiting or self.next == self.tail
    or crowded(self) or not channel:is_open() then return end
  self.sleeping = "urgent"
  self.wake:wait(math.min(linger, LONG))
  self.sleeping = nil
end

-- How long the sender may sleep.
local function patience(self, keeper)
  if self.sweep_due then return SWEEP end
  return life.exiting and leaving.patience(keeper) or LONG
end

-- What was under way on a channel that has ended is to be sent again.
local function take_back(self, reason)
  settle(self, huge)
  local past = self.next
  local coded = reason and (reason.kind == "channel" or reason.kind == "protocol") and reason.code
  local culprit
  for index = self.head, past - 1 do
    local slot = index % self.slots + 1
    if self.confirmations[slot] then
      self.confirmations[slot] = false
      self.resent = self.resent + 1
      culprit = index
    end
  end
  if coded then
    if self.in_flight == 1 then
      self.in_flight = 0
      self.resent = self.resent - 1
      finish(self, culprit, nil, reason)
    end
    self.suspects = math.max(self.suspects, past)
  end
  self.in_flight = 0
  self.next = self.head
end

-- Sends on one channel for as long as it lasts. Returns why it ended; nil when the worker leaves.
local function use(self, conn, channel, keeper)
  self.channel = channel
  channel._notice = function() noticed(self) end
  local off = channel:on("close", function() self:rouse() end)
  while channel:is_open() and not leaving.is_over(self, keeper) do
    if self.sweep_due then self.sweep_due = not settle(self, huge) end
    jobs.start(self, conn)
    local went = send_all(self, channel)
    if went == false then runtime.sleep(0) end -- its end is about to be told
    -- A message that there was no room for has waited; one that is blocked or held has not. Who has waited may have missed
    -- the channel's end.
    if went == nil and channel:is_open() and (channel._session.blocked or obstacles.held(self)) then
      sleep(self, patience(self, keeper))
    end
    if went then rest(self, channel, patience(self, keeper)) end
  end
  off()
  if channel:is_open() then return nil end
  return channel:_closed_error()
end

--- Runs in a timer of its own, for as long as the connection lasts. Returns why it ended.
function session.serve(self, conn, keeper)
  self.endpoint = conn.endpoint
  self.idle_since = nil
  conn:on("released", function() self:rouse() end)
  conn:on("unblocked", function() self:rouse() end)
  if self.config.setup then
    local ok, err = self.config.setup(conn)
    if not ok and err then return err end
  end
  local reason
  repeat
    local channel, err = conn:channel { confirm = true, window = self.window }
    if not channel then return err end
    local whole -- what a mistake leaves under way goes again like all else
    whole, reason = xpcall(use, debug.traceback, self, conn, channel, keeper)
    take_back(self, whole and reason)
    if not whole then error(reason, 0) end
    if reason then runtime.log("warn", self.config.name .. ": " .. tostring(reason)) end
  until not reason or not conn:is_open()
  return reason
end

--- An attempt to connect has failed.
function session.connecting_failed(self, err)
  if err.temporary ~= false then return end
  -- Who waits learns at once what waiting does not help against.
  local unknown = self:error("timeout", "the connection was lost before the broker confirmed the message, whose outcome"
    .. " is unknown, and cannot be made again: " .. err.message, false)
  for index = self.head, self.tail - 1 do
    if type(self.kept[index % self.slots + 1]) == "table" then
      finish(self, index, nil, index < self.sent_to and unknown or err)
    end
  end
  jobs.fail(self, err)
end

return session
