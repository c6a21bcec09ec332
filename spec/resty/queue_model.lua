-- The queue of what a worker publishes beside a plain list, under random operations; queue_spec runs it in nginx.
local queue = require "moonrabbit.resty.outbound.queue"

local model = {}

local ENTRIES = 20

local function new()
  local self = {
    entries = ENTRIES, config = { name = "model", bytes = 1e9 }, keeper = { need = function() return true end },
    sent_to = 1, suspects = 1, sending = 0, published = 0, confirmed = 0, overflows = 0, failures = {},
    error = function(_, kind) return { kind = kind } end,
  }
  queue.init(self)
  return self
end

-- A message is { body, sent, waiter }; `made` counts them.
local function push(self, list, made)
  local body = ("x"):rep(math.random(0, 3)) .. made
  local waiter = math.random() < 0.3 and { semaphore = { post = function() end } } or false
  local sending = self.kept[self.next % self.slots + 1] and self.next < self.tail
  self.sending = sending and self.next or 0
  local taken, err = queue.push(self, body, "route " .. body, waiter)
  assert(self.sending == (sending and self.next or 0), "another one is being sent")
  assert((taken ~= nil) == (#list < ENTRIES), "the bound does not hold")
  assert(taken or err.kind == "overflow")
  if taken then list[#list + 1] = { body = body, waiter = waiter, sent = false } end
end

-- As outbound/send.lua does.
local function send(self, list)
  while self.next < self.tail and not self.kept[self.next % self.slots + 1] do self.next = self.next + 1 end
  if self.next == self.tail then return end
  local slot = self.next % self.slots + 1
  local body = queue.what_is(self.kept[slot])
  self.confirmations[slot], self.in_flight = "confirmation " .. body, self.in_flight + 1
  self.next = self.next + 1
  self.sent_to = math.max(self.sent_to, self.next)
  for _, message in ipairs(list) do
    if not message.sent then
      assert(message.body == body, "it is not the next one")
      message.sent = true
      return
    end
  end
  error "nothing was to be sent"
end

-- All that was sent goes again.
local function take_back(self, list)
  for slot = 1, self.slots do self.confirmations[slot] = false end
  self.in_flight, self.next, self.suspects = 0, self.head, math.max(self.suspects, self.next)
  for _, message in ipairs(list) do message.sent, message.suspect = false, message.suspect or message.sent end
end

-- The index of the n-th message.
local function index_of(self, n)
  for index = self.head, self.tail - 1 do
    if self.kept[index % self.slots + 1] then
      n = n - 1
      if n == 0 then return index end
    end
  end
end

local function end_one(self, list)
  local n = math.random() < 0.02 and 1 or math.random(2, #list) -- the first one stays for long
  local index = index_of(self, n)
  local message = table.remove(list, n)
  if message.waiter then assert(message.waiter.index == index, "the waiter looks elsewhere") end
  if message.sent then queue.finish(self, index, true) else queue.take_out(self, index) end
end

local function compare(self, list)
  local n, bytes, in_flight = 0, 0, 0
  assert(self.tail - self.head <= self.slots, "more places than there are")
  for index = self.head, self.tail - 1 do
    local slot = index % self.slots + 1
    local kept = self.kept[slot]
    if kept then
      n = n + 1
      local message = list[n]
      assert(queue.what_is(kept) == message.body and self.routes[slot] == "route " .. message.body, "another message")
      assert(message.sent == (index < self.next), "`next` is elsewhere")
      assert(self.confirmations[slot] == (message.sent and "confirmation " .. message.body), "another confirmation")
      assert((message.suspect or false) == (index < self.suspects), "`suspects` is elsewhere")
      assert((message.suspect or message.sent) == (index < self.sent_to), "`sent_to` is elsewhere")
      bytes, in_flight = bytes + #message.body, in_flight + (message.sent and 1 or 0)
    end
  end
  assert(n == #list and n == self.count and bytes == self.bytes and in_flight == self.in_flight, "the sums are wrong")
end

function model.run(seed, steps)
  math.randomseed(seed)
  local self, list = new(), {}
  for made = 1, steps do
    local what = math.random()
    if what < 0.4 then
      push(self, list, made)
    elseif what < 0.7 then
      send(self, list)
    elseif what < 0.999 then
      if #list > 1 then end_one(self, list) end
    else
      take_back(self, list)
    end
    compare(self, list)
  end
  ngx.say "the same"
end

return model
