--- A class whose methods stand in several files, one for each subject.
-- @module moonrabbit.parts

--- Gives a class the methods of its parts. No two may have one of the same name.
---@param class table
---@param ... table   name -> method
return function(class, ...)
  for _, part in ipairs { ... } do
    for name, method in pairs(part) do
      if class[name] ~= nil then error("two parts of a class have the method " .. name, 2) end
      class[name] = method
    end
  end
end
