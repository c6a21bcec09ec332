-- docs/guarantees.md names the spec that proves each promise: each does, and those that it names are there.
local process = require "support.process"

local page = process.slurp "docs/guarantees.md"

-- { file, name } of every name between quotes that follows a link to a spec in a table's row.
local function named(text)
  local list = {}
  for line in text:gmatch "[^\n]+" do
    local proofs = line:match "^|[^|]*|(.*)|$"
    for file, names in (proofs or ""):gmatch "%]%(%.%./([^)]+)%)([^%[]*)" do
      for name in names:gmatch '"([^"]+)"' do list[#list + 1] = { file = file, name = name } end
    end
  end
  return list
end

-- The rows of the tables of promises.
local function promises(text)
  local rows, within = {}, false
  for line in text:gmatch "([^\n]*)\n" do
    if line == "| promise | proved by |" then
      within = true
    elseif not line:find "^|" then
      within = false
    elseif within and not line:find "^|[ |-]*$" then
      rows[#rows + 1] = line
    end
  end
  return rows
end

describe("the page of guarantees", function()
  local list = named(page)

  it("names a spec for each promise", function()
    local rows = promises(page)
    assert.is_true(#rows > 20, #rows)
    for _, row in ipairs(rows) do assert.is_true(#named(row .. "\n") > 0, "nothing proves: " .. row) end
  end)

  it("names only what is there", function()
    for _, each in ipairs(list) do
      local source = assert(process.slurp(each.file), each.file .. " is not there")
      assert.truthy(source:find('"' .. each.name .. '"', 1, true), each.file .. " has no spec \"" .. each.name .. '"')
    end
  end)
end)
