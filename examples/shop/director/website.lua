--- The shop's website: places orders at a steady rate by a Publisher, and knows of each whether the broker has
-- confirmed it. While too many are under way it takes none: a slow machine's shop gets fewer orders.
local mr = require "moonrabbit"
local now = require "moonrabbit.runtime.native".now

local website = {}

local Website = {}
Website.__index = Website

local MOST_UNDER_WAY = 600

local names = { '"Ada"', '"Grace"', '"Edsger"', '"Barbara"', '"Donald"', "null" }

-- A task of its own waits for the confirms, in the order of the messages.
local function collect(self)
  while not self.closed or self.head <= self.tail do
    local sent = self.sent[self.head]
    if not sent then
      mr.sleep(0.01)
    else
      local ok, err = sent[2]:wait(60)
      self.sent[self.head], self.head = nil, self.head + 1
      if ok then
        self.confirmed = self.confirmed + 1
        self.placed[sent[1]] = true
      else
        self.failures[#self.failures + 1] = tostring(err)
      end
    end
  end
  self.done = true
end

--- conn: a connection; exchange: where orders go.
function website.new(conn, exchange)
  local publisher, err = conn:publisher {
    exchange = exchange, routing_key = "order.placed", content_type = "application/json",
  }
  if not publisher then return nil, err end
  local self = setmetatable({
    publisher = publisher, published = 0, orders = 0, confirmed = 0, twice = 0, placed = {}, failures = {},
    sent = {}, head = 1, tail = 0, bodies = {}, closed = false, done = false,
  }, Website)
  mr.spawn(collect, self)
  return self
end

local function send(self, id)
  local confirmation, err = self.publisher:send_async(self.bodies[id], { message_id = id })
  if not confirmation then
    self.failures[#self.failures + 1] = tostring(err)
    return
  end
  self.published, self.tail = self.published + 1, self.tail + 1
  self.sent[self.tail] = { id, confirmation }
end

-- cents: as JSON
local function place(self, cents)
  self.orders = self.orders + 1
  local id = ("%06d"):format(self.orders)
  self.bodies[id] = ('{"id":"%s","customer":"customer%d@shop.example","name":%s,"cents":%s}'):format(
    id, self.orders % 97, names[self.orders % #names + 1], cents)
  send(self, id)
end

--- Places so many orders at once.
function Website:place(n)
  for _ = 1, n do place(self, tostring(500 + self.orders * 37 % 9500)) end
end

--- So many orders from a till of the old kind, which writes prices as people do.
function Website:place_old(n)
  for _ = 1, n do place(self, ('"%d,%02d"'):format(5 + self.orders % 90, self.orders % 100)) end
end

--- The last so many customers click once more: the same orders, with the same message ids.
function Website:click_again(n)
  for i = self.orders - n + 1, self.orders do
    send(self, ("%06d"):format(i))
    self.twice = self.twice + 1
  end
end

--- Takes orders until it is closed, `rate` a second. `finished`: how many orders have left the shop.
function Website:run(rate, finished)
  mr.spawn(function()
    local due, last = 0, now()
    while not self.closed do
      local time = now()
      due, last = due + rate * (time - last), time
      if self.orders - finished() > MOST_UNDER_WAY then due = 0 end
      if due >= 1 then
        self:place(math.floor(due))
        due = due % 1
      end
      mr.sleep(0.02)
    end
  end)
end

--- Takes no more orders. `done` is true once every confirm is there, or will never be.
function Website:close() self.closed = true end

return website
