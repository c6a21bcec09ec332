--- What `moonrabbit top` shows, as lines that fit a terminal. Pure.

local figures = require "moonrabbit.cli.top.figures"

local screen = {}

-- ---- Numbers ----------------------------------------------------------------------------------------

--- 0, 0.4, 12, 1234, 12.3k, 4.5M
local function number(n)
  if n == nil then return "-" end
  if n < 0 then return "-" .. number(-n) end
  if n == 0 then return "0" end
  if n < 9.95 and n ~= math.floor(n) then return ("%.1f"):format(math.max(n, 0.1)) end
  if n < 9999.5 then return ("%.0f"):format(n) end
  if n < 999950 then return ("%.1fk"):format(n / 1000) end
  if n < 999950000 then return ("%.1fM"):format(n / 1e6) end
  return ("%.0fM"):format(n / 1e6)
end

--- 0.4ms, 12ms, 1.5s, 60s
local function duration(seconds)
  if seconds == nil then return "-" end
  if seconds < 0.00995 then return ("%.1fms"):format(seconds * 1000) end
  if seconds < 0.9995 then return ("%.0fms"):format(seconds * 1000) end
  if seconds < 9.95 then return ("%.1fs"):format(seconds) end
  return ("%.0fs"):format(seconds)
end

screen.number, screen.duration = number, duration

-- ---- Text -------------------------------------------------------------------------------------------

-- Columns that a character takes: those of East Asia and most pictures two, marks that stand on others none.
local function width_of(code)
  if code >= 0x300 and code <= 0x36F or code == 0x200B or code == 0x200D or code >= 0xFE00 and code <= 0xFE0F then
    return 0
  end
  if code >= 0x1100 and (code <= 0x115F or code >= 0x2E80 and code <= 0xA4CF or code >= 0xAC00 and code <= 0xD7A3
    or code >= 0xF900 and code <= 0xFAFF or code >= 0xFE30 and code <= 0xFE6F or code >= 0xFF00 and code <= 0xFF60
    or code >= 0x1F300 and code <= 0x1FAFF or code >= 0x20000 and code <= 0x3FFFD) then
    return 2
  end
  return 1
end

-- The code point of a character of UTF-8.
local function code_of(char)
  local first = char:byte()
  if first < 0x80 then return first end
  local code = first % (first >= 0xF0 and 0x08 or first >= 0xE0 and 0x10 or 0x20)
  for i = 2, #char do code = code * 64 + char:byte(i) % 64 end
  return code
end

--- A text without anything that a terminal would obey.
local function clean(text)
  text = tostring(text):gsub("[%c\127]", "?")
  if not require("moonrabbit.cli.json").is_utf8(text) then return (text:gsub("[\128-\255]", "?")) end
  return (text:gsub("\194[\128-\159]", "?")) -- control characters in two bytes
end

--- A text in exactly so many columns; cut, with a mark, where it is longer.
local function fit(text, width, right)
  local used, kept, cut_at, cut_used = 0, {}, 0, 0
  for char in text:gmatch "[%z\1-\127\194-\244][\128-\191]*" do
    local wide = width_of(code_of(char))
    if used + wide > width then
      for i = #kept, cut_at + 1, -1 do kept[i] = nil end
      kept[#kept + 1] = width > 0 and "…" or nil
      used = cut_used + (width > 0 and 1 or 0)
      break
    end
    used = used + wide
    kept[#kept + 1] = char
    if used < width then cut_at, cut_used = #kept, used end
  end
  local pad = (" "):rep(width - used)
  return right and pad .. table.concat(kept) or table.concat(kept) .. pad
end

local function width_of_text(text)
  local used = 0
  for char in text:gmatch "[%z\1-\127\194-\244][\128-\191]*" do used = used + width_of(code_of(char)) end
  return used
end

screen.clean, screen.fit = clean, fit

-- ---- The table --------------------------------------------------------------------------------------

-- title, sort key, width, how a row shows it, and which goes first where there is no room for all (the highest).
local columns = {
  { "IN/s", "in", 7, function(r) return number(r.delivered_rate) end, 2 },
  { "OK/s", "ok", 7, function(r) return number(r.ok_rate) end, 7 },
  { "RETRY/s", "retry", 8, function(r) return number(r.retry_rate) end, 3 },
  { "DEAD/s", "dead", 7, function(r) return number(r.dead_letter_rate) end, 4 },
  { "FAIL/s", "fail", 7, function(r) return number(r.failed_rate) end, 8 },
  { "P50", "p50", 7, function(r) return duration(r.p50) end, 9 },
  { "P99", "p99", 7, function(r) return duration(r.p99) end, 5 },
  { "FLIGHT", "flight", 7, function(r) return number(r.in_flight) end, 6 },
  { "READY", "ready", 7, function(r) return number(r.ready) end, 1 },
  { "UNACKED", "unacked", 8, function(r) return number(r.unacked) end, 10 },
  { "PUB/s", nil, 7, function(r) return number(r.published_rate) end, 11 },
  { "CONS", nil, 5, function(r) return number(r.consumers) end, 12 },
}

local LEAST_NAME = 12

-- The columns that there is room for, and what is left for names.
local function choose(width)
  local chosen, room = {}, width - LEAST_NAME
  local by_weight = {}
  for i, column in ipairs(columns) do by_weight[i] = column end
  table.sort(by_weight, function(a, b) return a[5] < b[5] end)
  for _, column in ipairs(by_weight) do
    if column[3] > room then break end
    chosen[column] = true
    room = room - column[3]
  end
  local list = {}
  for _, column in ipairs(columns) do
    if chosen[column] then list[#list + 1] = column end
  end
  return list, math.max(1, LEAST_NAME + room)
end

local function header(chosen, name_width, sort)
  local cells = { fit((sort == "queue" and "*" or "") .. "QUEUE", name_width) }
  for _, column in ipairs(chosen) do
    cells[#cells + 1] = fit((sort == column[2] and "*" or "") .. column[1], column[3], true)
  end
  return table.concat(cells)
end

local function is_ill(row)
  return (row.dead_letter_rate or 0) > 0 or (row.breaker_open or 0) > 0
end

local function line_of(row, chosen, name_width)
  local name = clean(row.queue) .. ((row.breaker_open or 0) > 0 and " (breaker open)" or "")
  local cells = { fit(name, name_width) }
  for _, column in ipairs(chosen) do cells[#cells + 1] = fit(column[4](row), column[3], true) end
  return { text = table.concat(cells), ill = is_ill(row) }
end

-- ---- Above it ---------------------------------------------------------------------------------------

local function source_line(what, source)
  if not source then return nil end
  local text
  if source.problem then
    text = ("%s  %s: %s"):format(what, source.name, source.problem)
  elseif source.looks == 0 then
    text = ("%s  %s: asking"):format(what, source.name)
  else
    text = ("%s  %s"):format(what, source.name)
  end
  return { text = clean(text), ill = source.problem ~= nil }
end

local function connection_line(sum)
  if not sum.total then return nil end
  local text = ("connections  %s of %s are up"):format(number(sum.up), number(sum.total))
  if (sum.blocked or 0) > 0 then text = text .. (", %s blocked by the broker"):format(number(sum.blocked)) end
  return { text = text, ill = (sum.up or 0) < sum.total or (sum.blocked or 0) > 0 }
end

local function publisher_line(row)
  local text = ("publisher    %s  %s/s  p99 %s  %s%s unconfirmed"):format(clean(row.publisher),
    number(row.published_rate), duration(row.p99), number(row.unconfirmed),
    row.window and " of " .. number(row.window) or "")
  if (row.error_rate or 0) > 0 then text = text .. ("  %s errors/s"):format(number(row.error_rate)) end
  return { text = text, ill = (row.error_rate or 0) > 0 }
end

local function ladder_line(row)
  local parts = { ("retries      %s: %s wait"):format(clean(row.ladder), number(row.waiting or 0)) }
  if row.stuck then parts[#parts + 1] = number(row.stuck) .. " stuck" end
  if row.orphans then parts[#parts + 1] = number(row.orphans) .. " orphans" end
  return { text = table.concat(parts, ", "), ill = (row.stuck or 0) > 0 or (row.orphans or 0) > 0 }
end

local function sum_of(rows, field)
  local sum
  for _, row in ipairs(rows) do
    if row[field] then sum = (sum or 0) + row[field] end
  end
  return sum
end

local function total_line(rows)
  return { text = ("all queues   in %s/s  ok %s/s  retry %s/s  dead %s/s  failed %s/s  in flight %s  ready %s"):format(
    number(sum_of(rows, "delivered_rate")), number(sum_of(rows, "ok_rate")), number(sum_of(rows, "retry_rate")),
    number(sum_of(rows, "dead_letter_rate")), number(sum_of(rows, "failed_rate")), number(sum_of(rows, "in_flight")),
    number(sum_of(rows, "ready"))) }
end

local KEYS = "q ends  s sorts by the next column  r turns the order"

-- Of many publishers or ladders the first few.
local MOST_LINES = 3

local function some(lines, rows, line, what)
  for i = 1, math.min(#rows, MOST_LINES) do lines[#lines + 1] = line(rows[i]) end
  if #rows > MOST_LINES then lines[#lines + 1] = { text = ("%s and %d more"):format(what, #rows - MOST_LINES) } end
end

-- ---- All of it --------------------------------------------------------------------------------------

---@class moonrabbit.cli.TopView
---@field time string
---@field every number        seconds
---@field metrics moonrabbit.cli.Source[]
---@field management moonrabbit.cli.Source?
---@field note string?        said in a line of its own
---@field figures table       of figures.all
---@field sort string
---@field reverse boolean
---@field keys boolean        whether keys are read
---@field width integer
---@field height integer?     none: all rows are shown

--- The lines: { text, ill, kind }, each `width` columns at most.
---@param view moonrabbit.cli.TopView
---@return table[]
function screen.lines(view)
  local found, lines = view.figures, {}
  lines[1] = { text = ("moonrabbit top  %s  every %gs"):format(view.time, view.every), kind = "title" }
  for _, source in ipairs(view.metrics) do lines[#lines + 1] = source_line("metrics     ", source) end
  lines[#lines + 1] = source_line("management  ", view.management)
  if view.note then lines[#lines + 1] = { text = clean(view.note) } end
  lines[#lines + 1] = connection_line(found.connections)
  some(lines, found.publishers, publisher_line, "publishers  ")
  some(lines, found.ladders, ladder_line, "retries     ")
  lines[#lines + 1] = total_line(found.queues)
  lines[#lines + 1] = { text = "" }
  local chosen, name_width = choose(view.width)
  lines[#lines + 1] = { text = header(chosen, name_width, view.sort), kind = "header" }
  local rows = figures.sort(found.queues, view.sort, view.reverse)
  local footer = view.keys and 1 or 0
  local room = view.height and math.max(1, view.height - #lines - footer) or #rows
  local shown = #rows > room and room - 1 or #rows
  for i = 1, shown do lines[#lines + 1] = line_of(rows[i], chosen, name_width) end
  if #rows > shown then lines[#lines + 1] = { text = ("… and %d more"):format(#rows - shown) } end
  if #rows == 0 then lines[#lines + 1] = { text = "no queues are known" } end
  if view.keys then lines[#lines + 1] = { text = KEYS, kind = "footer" } end
  for i = view.height and view.height + 1 or math.huge, #lines do lines[i] = nil end
  for _, line in ipairs(lines) do
    if width_of_text(line.text) > view.width then line.text = fit(line.text, view.width) end
  end
  return lines
end

return screen
