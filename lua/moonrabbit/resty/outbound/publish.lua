--- Publishing as its callers see it: into the queue, and, for who wants to know, the wait for the outcome.
-- @module moonrabbit.resty.outbound.publish

local obstacles = require "moonrabbit.resty.outbound.obstacles"
local queue = require "moonrabbit.resty.outbound.queue"
local runtime = require "moonrabbit.runtime.resty"
local semaphore = require "ngx.semaphore"
local wait_for = require "moonrabbit.resty.outbound.wait"

local now = runtime.now
local push, take_out = queue.push, queue.take_out
local away, held, refused = obstacles.away, obstacles.held, obstacles.refused

local publish = {}

-- Semaphores that are kept to be used again.
local SPARE = 256

--- Puts a message in and returns at once.
---@param body string
---@param route userdata of core.route
---@return true|nil, moonrabbit.Error?
function publish.async(self, body, route)
  local ok, err = push(self, body, route, false)
  return ok, err
end

local function give_up(self, waiter, timeout)
  self.timeouts = self.timeouts + 1
  if self.metrics then self.metrics:touch() end
  local index = waiter.index
  if index < self.sent_to or index == self.sending then
    self.kept[index % self.slots + 1] = waiter.body
    return nil, self:error("timeout",
      ("the broker has not confirmed the message within %g s: its outcome is unknown"):format(timeout))
  end
  take_out(self, index)
  return nil, away(self, timeout) or held(self) or obstacles.blocked(self, timeout)
    or self:error("timeout", ("the message was not sent within %g s"):format(timeout))
end

--- Puts a message in and waits for its outcome.
---@param body string
---@param route userdata of core.route
---@param timeout number seconds
---@return true|nil, moonrabbit.Error?
function publish.confirmed(self, body, route, timeout)
  local failure = refused(self) or held(self)
  if failure then return nil, failure end
  local waiter = table.remove(self.spare) or { semaphore = semaphore.new() }
  waiter.done = false
  local seconds = self.seconds
  local began = seconds and now()
  local ok, err = push(self, body, route, waiter)
  if ok then
    wait_for(waiter.semaphore, timeout)
    if not waiter.done then return give_up(self, waiter, timeout) end
    ok, err = waiter.ok, waiter.err
    if ok and seconds then seconds:observe(now() - began) end
  end
  waiter.err, waiter.body = nil, nil
  if waiter.semaphore:count() == 0 and #self.spare < SPARE then self.spare[#self.spare + 1] = waiter end
  return ok, err
end

return publish
