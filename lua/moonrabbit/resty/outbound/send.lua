--- What is in the queue goes out, on one channel.
-- @module moonrabbit.resty.outbound.send

local queue = require "moonrabbit.resty.outbound.queue"
local runtime = require "moonrabbit.runtime.resty"

local finish, what_is = queue.finish, queue.what_is

-- A publish waits so long for room in the output before the sender looks around again.
local ROOM = 1

local function sent(self, index, confirmation)
  self.confirmations[index % self.slots + 1] = confirmation
  self.in_flight = self.in_flight + 1
  self.next = index + 1
  if index >= self.sent_to then self.sent_to = index + 1 end
end

-- Sends the message at `next`, which the engine has refused, once there is room. False: the channel or connection is
-- gone. nil: not now. While the broker has blocked publishing nothing is begun, so that who gives up knows it was not sent.
local function send_slowly(self, channel)
  if channel._session.blocked then return nil end
  local slot = self.next % self.slots + 1
  self.sending = self.next
  local whole, confirmation, err = pcall(channel._publish_route, channel, self.routes[slot], what_is(self.kept[slot]),
    ROOM)
  local index = self.sending -- it may have moved meanwhile
  self.sending = 0
  if not whole then
    confirmation, err = nil, self:error("protocol", "the message cannot be sent: " .. tostring(confirmation), false)
  end
  if confirmation then
    sent(self, index, confirmation)
    return true
  end
  if not whole or err.kind == "overflow" and err.temporary == false then
    finish(self, index, nil, err)
    return true
  end
  if err.kind == "overflow" or err.kind == "blocked" then return nil end
  return false
end

-- The window is full though it is larger than the queue: the broker has confirmed thousands of messages since, and not the
-- oldest. On another channel what is unconfirmed goes again.
local function begin_anew(self, channel)
  runtime.log("warn", ("%s: a message is unconfirmed while %d after it were sent: it goes again, on another channel")
    :format(self.config.name, self.window - 1))
  channel:_abandon()
  return false
end

--- Sends what there is; false and nil as send_slowly. The engine is called here, and not by a function or a pcall, for
--- LuaJIT compiles no return into one that it has not entered since the last call into C.
return function(self, channel)
  local core_channel, session, kept, routes, slots =
    channel._core, channel._session, self.kept, self.routes, self.slots
  local publish_route = core_channel.publish_route
  self.urgent = false
  while self.next < self.tail do
    local index = self.next
    if index < self.suspects and self.in_flight > 0 then return true end
    local slot = index % slots + 1
    if not kept[slot] then -- given up meanwhile
      self.next = index + 1
    else
      local confirmation, flush = publish_route(core_channel, routes[slot], (what_is(kept[slot])))
      if confirmation then
        sent(self, index, confirmation)
        -- So much is not to gather: the writer's turn.
        if flush and not session:flush(ROOM) then return nil end
        if not session.dirty then session:touch() end
      elseif flush == "window" then
        return begin_anew(self, channel)
      else
        local went = send_slowly(self, channel)
        if not went then return went end
      end
    end
  end
  return true
end
