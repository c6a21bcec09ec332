--- The sum of it all: from what was placed, what stands in the books and in the mailbox, and what is still in the
-- broker, how much is lost. Nobody's own counters are believed here: each order is looked for by its number.
local count = {}

local function size(set)
  local n = 0
  for _ in pairs(set) do n = n + 1 end
  return n
end

-- Those of `all` that are in none of the other sets, in their order.
local function missing(all, ...)
  local list, others = {}, { ... }
  for id in pairs(all) do
    local found = false
    for _, set in ipairs(others) do found = found or set[id] ~= nil end
    if not found then list[#list + 1] = id end
  end
  table.sort(list)
  return list
end

local function more_than_once(times)
  local list = {}
  for id, n in pairs(times) do
    if n > 1 then list[#list + 1] = id end
  end
  table.sort(list)
  return list
end

---@class shop.Facts
---@field placed table<string, true>        orders that the broker confirmed, by number
---@field unconfirmed integer               publishes that were never confirmed
---@field reached table<string, true>       orders that came to the payments
---@field books table<string, integer>      how often each order was paid
---@field mails table<string, integer>      how often each order's letter was sent
---@field parked table<string, table<string, true>>  by app: orders that lie in its dead letters
---@field waiting integer?                  messages in any queue of the shop but the dead letters, at the end; nil: unknown
---@field warm_up { published: integer, delivered: integer }

---@class shop.Sum
---@field lost string[]        orders that are nowhere
---@field lost_by table<string, integer>  how many of them went missing at the orders, payments, mail
---@field paid_twice string[]
---@field mailed_twice string[]
---@field parked integer
---@field problems string[]    what keeps this from being a success; empty: nothing was lost

local function say(problems, list, what)
  if #list == 0 then return end
  local some = table.concat(list, " ", 1, math.min(#list, 5))
  problems[#problems + 1] = ("%d orders %s: %s%s"):format(#list, what, some, #list > 5 and " ..." or "")
end

--- The sum.
---@param facts shop.Facts
---@return shop.Sum
function count.sum(facts)
  local parked = facts.parked
  local at_orders = missing(facts.placed, facts.reached, parked.orders)
  local at_payments = missing(facts.reached, facts.books, parked.payments)
  local at_mail = missing(facts.books, facts.mails, parked.mail)
  local sum = {
    lost = missing(facts.placed, facts.mails, parked.orders, parked.payments, parked.mail),
    lost_by = { orders = #at_orders, payments = #at_payments, mail = #at_mail },
    paid_twice = more_than_once(facts.books), mailed_twice = more_than_once(facts.mails),
    parked = size(parked.orders) + size(parked.payments) + size(parked.mail), problems = {},
  }
  sum.warm_up_lost = facts.warm_up.published - facts.warm_up.delivered
  local problems = sum.problems
  -- Those of a story that was broken off may be among what waits.
  say(problems, sum.lost, facts.waiting ~= 0 and "are lost, or among what waits" or "are lost")
  say(problems, sum.paid_twice, "were paid twice")
  say(problems, sum.mailed_twice, "were mailed twice")
  say(problems, missing(facts.books, facts.placed), "were paid and never placed")
  say(problems, missing(facts.mails, facts.books), "were mailed and never paid")
  local function add(n, what)
    if n ~= 0 then problems[#problems + 1] = ("%d %s"):format(n, what) end
  end
  add(sum.warm_up_lost, "messages of the warm-up are lost")
  add(facts.unconfirmed, "publishes were never confirmed")
  add(sum.parked, "orders are still parked")
  add(facts.waiting or 0, "messages are still in the shop's queues")
  if not facts.waiting then problems[#problems + 1] = "what is left in the queues could not be counted" end
  return sum
end

-- ---- The table --------------------------------------------------------------------------------------

local columns = { "published", "confirmed", "handled", "retried", "parked", "replayed", "duplicates", "lost" }

local function line(name, cells)
  local parts = { ("  %-8s"):format(name) }
  for i, cell in ipairs(cells) do parts[#parts + 1] = ("%" .. math.max(5, #columns[i]) .. "s"):format(cell) end
  return (table.concat(parts, " "):gsub("%s+$", ""))
end

--- Lines of a table. rows: a list of { name, published, confirmed, …, lost }, in the order of the columns; what does
-- not apply is "".
---@param rows table[]
---@param show fun(n: number): string
---@return string head, string[] lines
function count.table(rows, show)
  local lines = {}
  for i, row in ipairs(rows) do
    local cells = {}
    for k = 1, #columns do
      local cell = row[k + 1]
      cells[k] = type(cell) == "number" and show(cell) or cell or ""
    end
    lines[i] = line(row[1], cells)
  end
  return line("", columns), lines
end

return count
