--- What bench/run found, as text, JSON and SVG. A row is an entry of build/bench.json, and has
--- `spread`, the distance of the quickest run from the slowest as a part of the median.
local report = {}

local KEYS = { "case", "broker", "size", "peer", "rate", "cpu_us", "rss_kb", "runs", "syscalls", "median_us" }
local BASE = "rabbitmq-c" -- what the ratios are to

local function number(v)
  if math.type(v) == "integer" then return tostring(v) end
  return (("%.4f"):format(v):gsub("0+$", ""):gsub("%.$", ""))
end

function report.json(rows)
  local lines = {}
  for _, row in ipairs(rows) do
    local fields = {}
    for _, key in ipairs(KEYS) do
      local v = row[key]
      if v ~= nil then
        fields[#fields + 1] = ('"%s": %s'):format(key, type(v) == "string" and ('"%s"'):format(v) or number(v))
      end
    end
    lines[#lines + 1] = "  { " .. table.concat(fields, ", ") .. " }"
  end
  return "[\n" .. table.concat(lines, ",\n") .. "\n]\n"
end

local function bytes(size) return size >= 1024 and ("%d KiB"):format(size // 1024) or ("%d B"):format(size) end

local function thousands(v)
  local s = ("%d"):format(math.floor(v + 0.5))
  return (s:reverse():gsub("(%d%d%d)", "%1,"):reverse():gsub("^,", ""))
end

local WHAT = {
  publish = "publish with confirms, window 1000",
  consume = "consume, each message acked, prefetch 300",
  roundtrip = "publish one and await its confirm",
}

-- The rows by case, in the order in which they came.
local function groups(rows)
  local list, known = {}, {}
  for _, row in ipairs(rows) do
    local key = ("%s %s %d"):format(row.broker, row.case, row.size)
    if not known[key] then
      known[key] = { case = row.case, broker = row.broker, size = row.size,
                     title = ("%s, %s, %s broker"):format(WHAT[row.case], bytes(row.size), row.broker) }
      list[#list + 1] = known[key]
    end
    local group = known[key]
    group[#group + 1] = row
    if row.peer == BASE then group.base = row end
  end
  return list
end

function report.text(rows)
  local out = {}
  for _, group in ipairs(groups(rows)) do
    local table_rows = { { "", "msgs/s", "spread", "ratio", "CPU µs/msg", "ratio", "RSS KiB", "calls/msg",
                           group.case == "roundtrip" and "median µs" or "runs" } }
    for _, row in ipairs(group) do
      local base = group.base
      table_rows[#table_rows + 1] = {
        row.peer, thousands(row.rate), ("%.0f %%"):format(row.spread * 100),
        base and ("%.2f"):format(row.rate / base.rate) or "-",
        ("%.2f"):format(row.cpu_us), base and ("%.2f"):format(row.cpu_us / base.cpu_us) or "-", thousands(row.rss_kb),
        row.syscalls and ("%.3f"):format(row.syscalls) or "-",
        row.median_us and ("%.1f"):format(row.median_us) or tostring(row.runs),
      }
    end
    out[#out + 1] = ("%s (%d runs)"):format(group.title, group[1].runs)
    local widths = { 18, 12, 8, 7, 11, 7, 9, 10, 10 }
    for _, cells in ipairs(table_rows) do
      local line = {}
      for i, cell in ipairs(cells) do
        local pad = (" "):rep(widths[i] - utf8.len(cell))
        line[i] = i == 1 and cell .. pad or pad .. cell
      end
      out[#out + 1] = "  " .. table.concat(line)
    end
    out[#out + 1] = ""
  end
  return table.concat(out, "\n") .. "\n"
end

-- ---- The plot -----------------------------------------------------------------------------------
-- One panel a case, one bar a peer. Colours that read on white and on black alike; no background.

local COLUMNS, PANEL, LABEL, BAR, STEP, HEAD, GAP = 2, 520, 136, 280, 22, 34, 26
local COLOURS = {
  moonrabbit = "#e08a1e", ["rabbitmq-c"] = "#4a90c2", ["rabbitmq-c-100"] = "#9db8cc", other = "#8f8f8f",
}
local INK = "#808080"
local NAMES = { ["rabbitmq-c-100"] = "the same, ack per 100" }

local function colour(peer)
  if peer:find "^moonrabbit" then return COLOURS.moonrabbit end
  return COLOURS[peer] or COLOURS.other
end

local function text(x, y, anchor, s, more)
  return ('<text x="%g" y="%g" text-anchor="%s" fill="%s"%s>%s</text>'):format(x, y, anchor, INK, more or "", s)
end

-- What a bar shows: round trips by their median, the rest by their rate.
local function value(row) return row.case == "roundtrip" and (row.median_us or 1e6 / row.rate) or row.rate end

local function panel(group, x, y, out)
  local unit = group.case == "roundtrip" and "µs, median; shorter is better" or "messages/s; longer is better"
  out[#out + 1] = text(x, y + 12, "start", group.title, ' font-weight="bold"')
  out[#out + 1] = text(x, y + 26, "start", unit, ' font-size="11"')
  local most = 0
  for _, row in ipairs(group) do most = math.max(most, value(row)) end
  for i, row in ipairs(group) do
    local v, at = value(row), y + HEAD + (i - 1) * STEP
    local label = row.case == "roundtrip" and ("%.0f"):format(v) or thousands(v)
    if group.base and row ~= group.base then
      label = label .. ("  (%.2g×)"):format(v / value(group.base))
    end
    out[#out + 1] = text(x + LABEL - 8, at + 13, "end", NAMES[row.peer] or row.peer)
    out[#out + 1] = ('<rect x="%g" y="%g" width="%.1f" height="%g" rx="2" fill="%s"/>'):format(
      x + LABEL, at + 1, math.max(1.5, v / most * BAR), STEP - 6, colour(row.peer))
    out[#out + 1] = text(x + LABEL + v / most * BAR + 6, at + 13, "start", label)
  end
  return HEAD + #group * STEP
end

function report.svg(rows)
  -- Without "raw", which is no client and would make everything else short.
  local clients = {}
  for _, row in ipairs(rows) do
    if row.peer ~= "raw" then clients[#clients + 1] = row end
  end
  local body, y, tallest = {}, 16, 0
  for i, group in ipairs(groups(clients)) do
    local column = (i - 1) % COLUMNS
    if column == 0 and i > 1 then
      y, tallest = y + tallest + GAP, 0
    end
    tallest = math.max(tallest, panel(group, 16 + column * (PANEL + GAP), y, body))
  end
  local width, height = 32 + COLUMNS * PANEL + GAP, y + tallest + 16
  return ('<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" ' ..
    'font-family="system-ui, sans-serif" font-size="12">\n' ..
    '<title>moonrabbit and other AMQP 0-9-1 clients, measured side by side</title>\n%s\n</svg>\n'):format(
    width, height, width, height, table.concat(body, "\n"))
end

return report
