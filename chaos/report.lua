--- The results as a table for people, as build/chaos.json, and whether they are what was promised. Pure.
local report = {}

local function ms(seconds) return seconds and math.floor(seconds * 1000 + 0.5) end

--- One line of the results.
---@param fault table   of faults.lua
---@param sums table    of account.of
function report.row(fault, sums)
  return {
    fault = fault.name, queue = sums.queue,
    detect_ms = ms(sums.detect), back_ms = ms(sums.back), failover_ms = ms(sums.failover),
    publish_gap_ms = ms(sums.publish_gap), deliver_gap_ms = ms(sums.deliver_gap),
    confirmed = sums.confirmed, delivered = sums.delivered, lost = sums.lost, duplicated = sums.duplicated,
    out_of_order = sums.out_of_order, reordered = sums.out_of_order, failed = sums.failed,
  }
end

--- What is wrong with a run: a list of sentences. Nothing may be lost, but by the run that must lose.
function report.problems(run)
  local list = {}
  for _, text in ipairs(run.problems) do list[#list + 1] = text end
  local lost = 0
  for _, row in ipairs(run.rows) do
    lost = lost + row.lost
    if row.lost > 0 and not run.fault.loses then
      list[#list + 1] = ("%s: %d confirmed messages were lost, the first of them number %d"):format(row.name, row.lost,
        row.missing[1])
    end
    if row.failed > 0 and not run.fault.loses then
      list[#list + 1] = ("%s: %d publishes ended as failed"):format(row.name, row.failed)
    end
  end
  if run.fault.loses and #run.rows > 0 and lost == 0 then
    list[#list + 1] = "nothing was lost without confirms: this harness would not notice a loss"
  end
  if #run.rows == 0 and #list == 0 then list[1] = "there are no results" end
  return list
end

local columns = {
  { "fault", "fault" }, { "queue", "queue" }, { "detect ms", "detect_ms" }, { "back ms", "back_ms" },
  { "confirm ms", "failover_ms" }, { "publish gap ms", "publish_gap_ms" }, { "deliver gap ms", "deliver_gap_ms" },
  { "confirmed", "confirmed" }, { "delivered", "delivered" }, { "**lost**", "lost" }, { "duplicated", "duplicated" },
  { "out of order", "out_of_order" },
}

--- The table in Markdown.
function report.table(rows)
  local lines, heads, rules = {}, {}, {}
  for i, column in ipairs(columns) do
    heads[i], rules[i] = column[1], i > 2 and "---:" or "---"
  end
  lines[1] = "| " .. table.concat(heads, " | ") .. " |"
  lines[2] = "| " .. table.concat(rules, " | ") .. " |"
  for _, row in ipairs(rows) do
    local cells = {}
    for i, column in ipairs(columns) do
      local value = row[column[2]]
      cells[i] = value == nil and "–" or tostring(value)
    end
    lines[#lines + 1] = "| " .. table.concat(cells, " | ") .. " |"
  end
  return table.concat(lines, "\n") .. "\n"
end

local order = {
  "fault", "queue", "detect_ms", "back_ms", "failover_ms", "publish_gap_ms", "deliver_gap_ms", "confirmed", "delivered",
  "lost", "duplicated", "out_of_order", "reordered", "failed",
}

local function encoded(value)
  if value == nil then return "null" end
  if type(value) == "number" then return ("%d"):format(value) end
  return '"' .. value:gsub('[%c"\\]', function(c) return ("\\u%04x"):format(c:byte()) end) .. '"'
end

--- The rows as JSON; what there was not is null.
function report.json(rows)
  local list = {}
  for i, row in ipairs(rows) do
    local fields = {}
    for j, key in ipairs(order) do fields[j] = ('"%s": %s'):format(key, encoded(row[key])) end
    list[i] = "  { " .. table.concat(fields, ", ") .. " }"
  end
  return "[\n" .. table.concat(list, ",\n") .. "\n]\n"
end

--- The middle of the numbers in a list; nil of none.
function report.median(list)
  local sorted = {}
  for i, number in ipairs(list) do sorted[i] = number end
  table.sort(sorted)
  if #sorted == 0 then return nil end
  local middle = math.floor((#sorted + 1) / 2)
  return #sorted % 2 == 1 and sorted[middle] or (sorted[middle] + sorted[middle + 1]) / 2
end

return report
