--- From pages of metrics and lists of queues to what `moonrabbit top` shows. Pure.
--
-- A look at a page is { at = seconds, page = samples by name }. Rates are differences between two looks; a counter that
-- has fallen began anew, so all it has counts. What is not known is nil.

local figures = {}

-- ---- Pages ------------------------------------------------------------------------------------------

-- NaN and infinity are numbers to nobody.
local function is_finite(value) return value - value == 0 end

-- Numbers of a page, added up by one label: value of the label -> number. `only`: labels that must be so.
local function by_label(page, name, label, only)
  local found = {}
  for _, sample in ipairs(page[name] or {}) do
    local key, fits = sample.labels[label], is_finite(sample.value)
    for other, value in pairs(only or {}) do fits = fits and sample.labels[other] == value end
    if key and fits then found[key] = (found[key] or 0) + sample.value end
  end
  return found
end

-- How much a counter has grown between two looks.
local function growth(before, now)
  before = before or 0
  return now < before and now or now - before
end

-- Adds to rows[key][field] for each key.
local function add(rows, field, values)
  for key, value in pairs(values) do
    local row = rows[key]
    if not row then
      row = {}
      rows[key] = row
    end
    row[field] = (row[field] or 0) + value
  end
end

local function rates(before, now, name, label, only)
  local seconds, old = now.at - before.at, by_label(before.page, name, label, only)
  local found = by_label(now.page, name, label, only)
  for key, value in pairs(found) do found[key] = growth(old[key], value) / seconds end
  return found
end

-- Buckets of a histogram: key -> { [bound] = how many more }.
local function add_buckets(rows, before, now, name, label)
  local function read(page)
    local found = {}
    for _, sample in ipairs(page[name .. "_bucket"] or {}) do
      local key, bound = sample.labels[label], tonumber(sample.labels.le)
      if sample.labels.le == "+Inf" then bound = math.huge end
      if key and bound and is_finite(sample.value) then
        found[key] = found[key] or {}
        found[key][bound] = (found[key][bound] or 0) + sample.value
      end
    end
    return found
  end
  local old = read(before.page)
  for key, buckets in pairs(read(now.page)) do
    local row = rows[key] or {}
    rows[key], row.buckets = row, row.buckets or {}
    -- All buckets fall when a process starts anew.
    local anew = old[key] == nil or (buckets[math.huge] or 0) < (old[key][math.huge] or 0)
    for bound, count in pairs(buckets) do
      local more = anew and count or math.max(0, count - (old[key][bound] or 0))
      row.buckets[bound] = (row.buckets[bound] or 0) + more
    end
  end
end

--- The value below which a share of what fell into buckets lies, as Prometheus estimates it; nil: there is nothing.
---@param buckets table<number, number> cumulated, by upper bound
---@param share number
---@return number?
function figures.quantile(buckets, share)
  local bounds = {}
  for bound in pairs(buckets) do bounds[#bounds + 1] = bound end
  table.sort(bounds)
  local total = buckets[math.huge]
  if not total or total <= 0 then return nil end
  local rank, below, count = share * total, 0, 0
  for _, bound in ipairs(bounds) do
    local here = buckets[bound]
    if here >= rank and here > count then
      if bound == math.huge then return below end
      return below + (bound - below) * (rank - count) / (here - count)
    end
    if bound < math.huge then below = bound end
    count = math.max(count, here)
  end
  return below
end

local function latencies(rows)
  for _, row in pairs(rows) do
    if row.buckets then
      row.p50, row.p99 = figures.quantile(row.buckets, 0.5), figures.quantile(row.buckets, 0.99)
      row.buckets = nil
    end
  end
end

-- ---- Queues -----------------------------------------------------------------------------------------

local SETTLED = "moonrabbit_messages_settled_total"

local function queue_gauges(rows, page)
  add(rows, "in_flight", by_label(page, "moonrabbit_messages_in_flight", "queue"))
  add(rows, "breaker_open", by_label(page, "moonrabbit_breaker_open", "queue"))
  add(rows, "retries", by_label(page, SETTLED, "queue", { outcome = "retry" }))
  add(rows, "dead_letters", by_label(page, SETTLED, "queue", { outcome = "dead_letter" }))
end

local function queue_rates(rows, before, now)
  add(rows, "delivered_rate", rates(before, now, "moonrabbit_messages_delivered_total", "queue"))
  for _, outcome in ipairs { "ok", "retry", "dead_letter" } do
    add(rows, outcome .. "_rate", rates(before, now, SETTLED, "queue", { outcome = outcome }))
  end
  add(rows, "failed_rate", rates(before, now, "moonrabbit_handler_failures_total", "queue"))
  add_buckets(rows, before, now, "moonrabbit_handler_seconds", "queue")
end

local function detail(queue, name)
  local stats = type(queue.message_stats) == "table" and queue.message_stats[name .. "_details"]
  return type(stats) == "table" and tonumber(stats.rate) or nil
end

local function broker_row(row, queue)
  row.ready, row.unacked = tonumber(queue.messages_ready), tonumber(queue.messages_unacknowledged)
  row.consumers, row.published_rate = tonumber(queue.consumers), detail(queue, "publish")
  row.taken_rate = detail(queue, "deliver_get")
end

-- ---- The rest ---------------------------------------------------------------------------------------

local function total(page, name)
  local sum
  for _, sample in ipairs(page[name] or {}) do
    if is_finite(sample.value) then sum = (sum or 0) + sample.value end
  end
  return sum
end

local function publisher_rows(rows, before, now)
  add(rows, "unconfirmed", by_label(now.page, "moonrabbit_publisher_unconfirmed", "publisher"))
  add(rows, "window", by_label(now.page, "moonrabbit_publisher_window", "publisher"))
  add(rows, "published", by_label(now.page, "moonrabbit_publishes_total", "publisher"))
  if not before then return end
  add(rows, "published_rate", rates(before, now, "moonrabbit_publishes_total", "publisher"))
  add(rows, "error_rate", rates(before, now, "moonrabbit_publish_errors_total", "publisher"))
  add_buckets(rows, before, now, "moonrabbit_publish_seconds", "publisher")
end

-- Every process sees the same ladder.
local function ladder_rows(rows, page)
  for field, name in pairs { waiting = "waiting", stuck = "stuck", orphans = "orphans" } do
    for ladder, value in pairs(by_label(page, "moonrabbit_ladder_" .. name, "ladder")) do
      rows[ladder] = rows[ladder] or {}
      rows[ladder][field] = math.max(rows[ladder][field] or 0, value)
    end
  end
end

local function connections(sum, page)
  for field, name in pairs { total = "connections", up = "connection_up", blocked = "connection_blocked" } do
    local value = total(page, "moonrabbit_" .. name)
    if value then sum[field] = (sum[field] or 0) + value end
  end
end

local function as_list(rows, label)
  local list = {}
  for key, row in pairs(rows) do
    row[label] = key
    list[#list + 1] = row
  end
  table.sort(list, function(a, b) return a[label] < b[label] end)
  return list
end

--- Everything there is to show.
---@param looks { before: table?, now: table }[]  of each address of metrics
---@param queues table[]?                          as the management API lists them
---@return { queues: table[], publishers: table[], ladders: table[], connections: table }
function figures.all(looks, queues)
  local of_queue, of_publisher, of_ladder, sum = {}, {}, {}, {}
  for _, look in ipairs(looks) do
    local before = look.before and look.before.at < look.now.at and look.before or nil
    queue_gauges(of_queue, look.now.page)
    if before then queue_rates(of_queue, before, look.now) end
    publisher_rows(of_publisher, before, look.now)
    ladder_rows(of_ladder, look.now.page)
    connections(sum, look.now.page)
  end
  latencies(of_queue)
  latencies(of_publisher)
  for _, queue in ipairs(queues or {}) do
    if type(queue.name) == "string" then
      of_queue[queue.name] = of_queue[queue.name] or {}
      broker_row(of_queue[queue.name], queue)
    end
  end
  return {
    queues = as_list(of_queue, "queue"), publishers = as_list(of_publisher, "publisher"),
    ladders = as_list(of_ladder, "ladder"), connections = sum,
  }
end

-- ---- Order ------------------------------------------------------------------------------------------

--- Sort keys -> the field of a row.
figures.sort_keys = {
  queue = "queue", ["in"] = "delivered_rate", ok = "ok_rate", retry = "retry_rate", dead = "dead_letter_rate",
  fail = "failed_rate", p50 = "p50", p99 = "p99", flight = "in_flight", ready = "ready", unacked = "unacked",
}

--- In the order of the columns.
figures.sort_order = { "queue", "in", "ok", "retry", "dead", "fail", "p50", "p99", "flight", "ready", "unacked" }

--- Sorts rows of queues: names from the first, numbers from the largest; what is not known comes last, and names decide
--- between equals.
---@param rows table[]
---@param key string one of sort_keys
---@param reverse boolean
---@return table[] rows
function figures.sort(rows, key, reverse)
  local field = figures.sort_keys[key]
  table.sort(rows, function(a, b)
    local x, y = a[field], b[field]
    if x == y then return a.queue < b.queue end
    if x == nil or y == nil then return y == nil end
    if (field == "queue") ~= reverse then return x < y end
    return x > y
  end)
  return rows
end

return figures
